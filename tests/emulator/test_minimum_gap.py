"""`--minimum-gap` refuses by an interval that holds, before the work where it can, and says what still stands."""

import json
from pathlib import Path
from typing import Any

import pytest

import emulator.build
from emulator.distil import DistilPlan
from isthmus import bundle
from isthmus.errors import DataError, ModelError, UsageError
from isthmus.report.verdict import FEWEST_ROWS
from tests.emulator.conftest import Make

STEPS = DistilPlan(steps=4, batch_size=2, lr=1e-3, warmup_steps=1, seed=0)
DROP: dict[str, Any] = {"method": "drop", "keep": 2}


def test_an_emulator_too_near_to_the_model_is_not_given_away(make: Make, plenty: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gap is .*, and --minimum-gap asks for 50 at its lower limit; .* --keep$"):
        make(tmp_path / "out", method="drop", keep=4, minimum_gap=50.0, text=plenty)
    assert not list(tmp_path.iterdir())
    make(tmp_path / "out", method="drop", keep=4, minimum_gap=-0.5, text=plenty)


def test_the_gap_is_stored_with_its_interval_and_judged_by_the_lower_limit(
    make: Make, plenty: Path, tmp_path: Path
) -> None:
    distance = make(tmp_path / "out", method="drop", keep=1, text=plenty).about.distance
    assert distance is not None
    assert distance.gap_interval is not None
    low, high = distance.gap_interval
    assert low < distance.gap < high
    told = json.loads((tmp_path / "out" / "emulator.json").read_text())["distance"]
    assert (told["gap"], told["gap_interval"]) == (distance.loss - distance.loss_of_span, [low, high])
    make(tmp_path / "enough", method="drop", keep=1, text=plenty, minimum_gap=low)
    with pytest.raises(ModelError, match="at its lower limit"):
        make(tmp_path / "unsure", method="drop", keep=1, text=plenty, minimum_gap=(low + distance.gap) / 2)


def test_too_few_held_out_rows_are_refused_before_any_weight_is_read(
    make: Make, text: Path, plenty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path / "few", text=text, **DROP).about.distance
    assert made is not None
    assert made.rows < FEWEST_ROWS
    for name in ("load_whole", "outline", "model_digest"):
        monkeypatch.setattr(emulator.build, name, None)
    for out in ("few", "new"):
        with pytest.raises(DataError, match=rf"public.txt: {made.rows} of its \d+ rows are held out") as caught:
            make(tmp_path / out, text=text, minimum_gap=-50.0, **DROP)
        assert "needs 24: give 240 rows of text (a .jsonl has one a line, " in str(caught.value)
        assert str(caught.value).endswith("a .txt is cut into rows of 48 tokens)")
    assert {path.name for path in tmp_path.iterdir()} == {"few", "few.costs.jsonl"}


def test_a_refusal_keeps_the_distillation_and_names_it_and_resume_takes_it_up(
    make: Make, plenty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**DROP, "text": plenty, "distill": plenty, "distillation": STEPS}
    with pytest.raises(ModelError, match=r"its distillation is kept in .*: go on with --resume and a") as caught:
        make(tmp_path / "out", minimum_gap=50.0, **given)
    (kept,) = tmp_path.iterdir()
    assert str(kept) in str(caught.value)
    assert list(kept.glob("step-00000004-*.safetensors"))
    with pytest.raises(UsageError, match="go on with --resume, or remove"):
        make(tmp_path / "out", **given)
    monkeypatch.setattr("emulator.trained.TrainedWeights.step", None)
    make(tmp_path / "out", resume=True, **given)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.costs.jsonl"}


@pytest.mark.parametrize("resume", [False, True])
def test_of_a_finished_emulator_that_is_refused_it_is_said_that_it_still_stands(
    make: Make, plenty: Path, tmp_path: Path, resume: bool
) -> None:
    made = make(tmp_path / "out", text=plenty, **DROP)
    with pytest.raises(ModelError, match=r"asks for 99 .*; \S+/out still holds it, .* would offer it: remove"):
        make(tmp_path / "out", text=plenty, resume=resume, minimum_gap=99.0, **DROP)
    assert bundle.verify(tmp_path / "out", None) == made.manifest
