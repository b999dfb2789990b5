"""A folder appears whole or not at all, and what a killed process left of it goes when the next one begins."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from emulator.build import build
from emulator.distil import DistilPlan
from emulator.folder import appearing
from emulator.plan import Plan
from tests.emulator.conftest import CUT, QUIET
from tests.harness import ENVIRONMENT

WAITING = """
import sys, time
from pathlib import Path
from emulator.folder import appearing
with appearing(Path(sys.argv[1])) as folder:
    (folder / "half.txt").write_text("half")
    print("here", flush=True)
    time.sleep(60)
"""


def writing(out: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(out)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def test_a_process_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    process = writing(tmp_path / "out")
    assert list(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    out = tmp_path / "o[u]t"
    killed = writing(out)
    killed.kill()
    killed.wait(20)
    other = writing(tmp_path / "other")
    other.kill()
    other.wait(20)
    (left,) = tmp_path.glob(".o?u?t-*")
    (others,) = tmp_path.glob(".other-*")
    living = writing(out)
    try:
        assert not left.exists()
        (draft,) = tmp_path.glob(".o?u?t-*")
        with appearing(out) as folder:
            assert (draft / "whole" / "half.txt").read_text() == "half"
            (folder / "mine.txt").write_text("mine")
        assert {path.name for path in tmp_path.iterdir()} == {out.name, draft.name, others.name}
        assert [path.name for path in out.iterdir()] == ["mine.txt"]
    finally:
        living.kill()
        living.wait(20)


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, synced = tmp_path / "out", os.fsync, {}

    def fsync(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = out.exists()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with appearing(out) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text("a")
        (folder / "b.txt").write_text("b")
    for path in (out, *out.rglob("*")):
        assert synced.get(path.stat().st_ino) is False, path
    assert synced[tmp_path.stat().st_ino] is True


def test_signals_are_left_to_the_program_around_it(tmp_path: Path) -> None:
    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with appearing(tmp_path / "one"):
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    with appearing(tmp_path / "two"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere() -> None:
        with appearing(tmp_path / "three"):
            time.sleep(0)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert (tmp_path / "three").is_dir()


@pytest.mark.parametrize("named", [".", "x/..", "x/../y", "./y/"])
def test_a_folder_may_be_named_in_any_way(
    named: str, homes: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    due = Path(os.path.normpath(here / named))
    if named == "x/../y":
        (here / "x").mkdir()
    settings = DistilPlan(steps=1, batch_size=2, lr=1e-3, warmup_steps=0, seed=0)
    plan = Plan(homes["llama"], CUT, "drop", keep=2, distill=text, distillation=settings, max_length=48)
    made = build(plan, Path(named), None, False, QUIET)
    assert (due / "emulator.json").is_file()
    assert build(plan, due, None, True, QUIET) == made
    assert due.with_name(f"{due.name}.costs.jsonl").is_file()
    assert {path.name for path in tmp_path.iterdir()} <= {"here", "here.costs.jsonl"}
