"""An interrupted build says what is kept; one with other settings is never begun beside it by mistake."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import emulator.build
from emulator.build import build
from emulator.distil import DistilPlan
from emulator.plan import Plan
from isthmus.errors import InterruptedRunError, RunError, UsageError
from tests.emulator.conftest import CUT, Make
from tests.emulator.test_build import interrupted_after

Stop = Callable[[pytest.MonkeyPatch], AbstractContextManager[None]]

STEPS = DistilPlan(steps=4, batch_size=2, lr=1e-3, warmup_steps=1, seed=0)


@pytest.fixture
def given(text: Path) -> dict[str, Any]:
    return {"method": "drop", "keep": 2, "distill": text, "distillation": STEPS}


@pytest.fixture
def begun(make: Make, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a stopped distillation is kept in."""
    with interrupted_after(2, monkeypatch), pytest.raises(InterruptedRunError):
        make(tmp_path / "out", **given)
    (kept,) = tmp_path.iterdir()
    return kept


def break_off(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["fill", "measure", "write_bundle"])
def test_ctrl_c_without_a_distillation_says_that_nothing_is_kept_and_keeps_nothing(
    at: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulator.build, at, break_off)
    with pytest.raises(InterruptedRunError, match=r"^interrupted; nothing is kept: the same command begins anew$"):
        make(tmp_path / "out", method="rank", keep=0.5)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_after_a_distillation_says_where_it_is_kept_and_resume_goes_on(
    make: Make, given: dict[str, Any], begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(emulator.build, "write_bundle", break_off)
        with pytest.raises(InterruptedRunError) as caught:
            make(tmp_path / "out", resume=True, **given)
    assert str(caught.value) == (
        f"interrupted; what was distilled is kept in {begun}: go on with the same command and --resume"
    )
    assert list(begun.glob("step-00000004-*"))
    whole = make(tmp_path / "whole", **given)
    assert make(tmp_path / "out", resume=True, **given).about == whole.about


@contextmanager
def interrupted_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop as a distillation begins."""
    with monkeypatch.context() as patch:
        patch.setattr(emulator.build, "distil", break_off)
        yield


@pytest.mark.parametrize("stop", [interrupted_before, partial(interrupted_after, 2)], ids=["before", "at a point"])
def test_what_an_interrupted_build_measured_is_in_the_record_of_the_resumed_one(
    stop: Stop, make: Make, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stop(monkeypatch), pytest.raises(InterruptedRunError):
        make(tmp_path / "out", **given)
    whole, resumed = make(tmp_path / "whole", **given), make(tmp_path / "out", resume=True, **given)
    assert whole.costs is not None
    assert resumed.costs is not None
    once, spent = (record.ledger.total("measure", "cloud_forward_flops") for record in (whole.costs, resumed.costs))
    of_one = once / 6  # before it, after each of four steps, and of what is shipped
    assert spent == 7 * of_one, "the resumed build measures once more before it goes on, and nothing is forgotten"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"keep": 3}, "--keep 2 there and 3 here"),
        ({"method": "share", "bits": 8}, "--method drop there and share here; --bits none there and 8 here"),
        ({"distillation": replace(STEPS, lr=2e-3)}, "--lr 0.001 there and 0.002 here"),
        ({"max_length": 47}, "--max-length 48 there and 47 here"),
        ({"distill": None, "distillation": None}, "a --distill there; --steps 4 there and none here; --batch-size 2"),
    ],
)
def test_an_unfinished_build_with_other_settings_is_named_with_them_and_left_alone(
    changes: dict[str, Any], named: str, resume: bool, make: Make, given: dict[str, Any], begun: Path, tmp_path: Path
) -> None:
    before = sorted(path.name for path in begun.iterdir())
    with pytest.raises(UsageError) as caught:
        make(tmp_path / "out", resume=resume, **{**given, **changes})
    assert f"{tmp_path / 'out'} with other settings is kept in {begun} ({named}" in str(caught.value)
    assert str(caught.value).endswith("and --resume to go on with it, or remove that folder to discard it")
    assert sorted(path.name for path in begun.iterdir()) == before
    assert list(tmp_path.iterdir()) == [begun]


def test_other_text_another_model_and_other_threads_are_named_without_their_digests(
    make: Make, given: dict[str, Any], begun: Path, plenty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    with pytest.raises(UsageError) as caught:
        make(tmp_path / "out", "gpt2", True, **{**given, "distill": plenty})
    found = str(caught.value)
    assert "(another --model; another --distill; computed with isthmus " in found
    assert "77 threads here)" in found
    assert not any(len(word) >= 64 for word in found.replace("/", " ").split())


def test_of_an_unfinished_build_that_does_not_say_its_settings_that_is_said(
    make: Make, given: dict[str, Any], begun: Path, tmp_path: Path
) -> None:
    for content in (None, "{"):
        (begun / "settings.json").unlink() if content is None else (begun / "settings.json").write_text(content)
        with pytest.raises(UsageError, match=r"is kept in .* \(which ones is not written there\)"):
            make(tmp_path / "out", **{**given, "keep": 3})


def test_builds_of_other_folders_do_not_stand_in_each_others_way(
    make: Make, given: dict[str, Any], begun: Path, tmp_path: Path
) -> None:
    for name in ("out-2", "ou", "out-01234567"):
        make(tmp_path / name, method="drop", keep=3)
    begun.rename(tmp_path / ".out-01234567.tmp")
    make(tmp_path / "out", method="drop", keep=3)


def test_to_resume_what_was_never_begun_begins_and_says_so(homes: dict[str, Path], tmp_path: Path) -> None:
    said = io.StringIO()
    plan = Plan(homes["llama"], CUT, "drop", keep=2)
    build(plan, tmp_path / "out", None, True, Console(file=said, width=200))
    assert said.getvalue().startswith("there is nothing to resume: the build begins\n")


def test_a_disk_that_refuses_the_folder_is_told_in_one_line(
    make: Make, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("emulator.unfinished.write_whole", full)
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\): make room for checkpoints"):
        make(tmp_path / "out", **given)


def test_what_is_measured_before_a_distillation_begins_its_curve_without_being_measured_twice(
    make: Make, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = emulator.build.measure

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(emulator.build, "measure", counted)
    told = make(tmp_path / "out", **given).about.distillation
    assert told is not None
    assert told.curve[0].held_out == told.before.hidden
    assert len(calls) == 1 + sum(point.held_out is not None for point in told.curve)
    assert "settings" not in json.dumps(sorted(path.name for path in (tmp_path / "out").iterdir()))
