"""An emulator is never measured on rows that it was made with."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import emulator.build
from emulator.build import build
from emulator.distil import DistilPlan
from emulator.plan import Plan
from isthmus.errors import DataError, InterruptedRunError
from tests.emulator.conftest import CUT

RANK: dict[str, Any] = {"method": "rank", "keep": 0.5}
DROP: dict[str, Any] = {"method": "drop", "keep": 2}
STEPS = DistilPlan(steps=1, batch_size=2, lr=1e-3, warmup_steps=0, seed=0)


def written(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps({"text": f"the river row {row}"}) + "\n" for row in rows))
    return path


class Seen:
    """What a build is made with and measured on, up to where it would train."""

    def __init__(self, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
        monkeypatch.setattr(emulator.build, "fill", self._fill)
        monkeypatch.setattr(emulator.build, "measure", self._measure)
        monkeypatch.setattr(emulator.build, "distil", self._distil)
        said = io.StringIO()
        self._distils = "distillation" in given
        self.calibrated: list[Any] = []
        self.distilled: list[Any] = []
        self.measured: list[Any] = []
        with pytest.raises(InterruptedRunError):
            build(Plan(model, CUT, max_length=48, **given), out, None, False, Console(file=said, width=1000))
        self.said = said.getvalue()

    def _fill(self, pair: Any, linears: Any, rows: Any, *_: Any) -> None:
        self.calibrated = list(rows)

    def _measure(self, pair: Any, rows: Any, *_: Any) -> None:
        self.measured = list(rows)
        if not self._distils:
            raise InterruptedRunError("far enough")

    def _distil(self, pair: Any, rows: Any, *_: Any) -> None:
        self.distilled = list(rows)
        raise InterruptedRunError("far enough")


def tokens(rows: list[Any]) -> set[Any]:
    return {row.ids for row in rows}


def test_rows_that_repeat_in_one_file_are_not_calibrated_with_where_they_are_measured_on(
    homes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(tmp_path / "rows.jsonl", [*range(27), 5, 6, 6])
    seen = Seen(homes["llama"], tmp_path / "out", monkeypatch, text=text, **RANK)
    assert (len(seen.measured), len(seen.calibrated)) == (3, 25)
    assert not tokens(seen.measured) & tokens(seen.calibrated)
    assert f"{text}: 2 of 27 rows are also held out; nothing is made with them" in seen.said


@pytest.mark.parametrize("same", [True, False], ids=["one file", "two files"])
def test_rows_that_are_measured_on_are_not_distilled_on(
    same: bool, homes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(tmp_path / "rows.jsonl", [*range(27), 5, 6, 26])
    distill = text if same else written(tmp_path / "others.jsonl", [*range(50, 60), 5, 26, *range(60, 71)])
    given = {"text": text, "distill": distill, "distillation": STEPS, **DROP}
    seen = Seen(homes["llama"], tmp_path / "out", monkeypatch, **given)
    assert not tokens(seen.measured) & tokens(seen.distilled)
    taken, every = (3, 27) if same else (2, 21)
    assert len(seen.distilled) == every - taken
    assert f"{distill}: {taken} of {every} rows are also held out" in seen.said


def test_text_of_which_nothing_repeats_is_used_whole_and_in_silence(
    homes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(tmp_path / "rows.jsonl", range(30))
    seen = Seen(homes["llama"], tmp_path / "out", monkeypatch, text=text, **RANK)
    assert (len(seen.measured), len(seen.calibrated)) == (3, 27)
    assert "held out" not in seen.said


def test_text_that_leaves_too_little_is_refused_where_an_emulator_would_be_made_with_it(
    homes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(tmp_path / "rows.jsonl", [1, 2] * 20)
    with pytest.raises(DataError, match=r"36 of 36 rows .* among the 4 that are held out, and the other 0 are too few"):
        build(Plan(homes["llama"], CUT, text=text, **RANK), tmp_path / "out", None, False, Console(quiet=True))
    assert not (tmp_path / "out").exists()
    assert len(Seen(homes["llama"], tmp_path / "out", monkeypatch, text=text, **DROP).measured) == 4
