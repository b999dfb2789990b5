"""A crash at any moment leaves a checkpoint that can be trusted."""

import shutil
from pathlib import Path

import pytest
import torch

from isthmus.errors import RunError
from isthmus.report.schema import RunReport
from isthmus.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from tests.faults.training import as_flags, command_here, is_one_line, run_here, settings


def state(step: int) -> Checkpoint:
    values = torch.arange(64, dtype=torch.float32) + step
    return Checkpoint(step, {"master/a": values, "step/a": torch.tensor(float(step))}, {"seconds": 0.5 * step})


def found(directory: Path) -> int | None:
    checkpoint = load_checkpoint(directory)
    if checkpoint is not None:
        assert torch.equal(checkpoint.tensors["master/a"], state(checkpoint.step).tensors["master/a"])
        assert checkpoint.facts["seconds"] == 0.5 * checkpoint.step
    return checkpoint and checkpoint.step


def test_the_newest_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for step in (9, 10):
        save_checkpoint(tmp_path, state(step))
    assert found(tmp_path) == 10


@pytest.mark.parametrize("length", ["nothing", "the length word", "the header", "the middle", "all but a byte"])
def test_a_checkpoint_torn_anywhere_is_skipped_for_the_one_before_it(tmp_path: Path, length: str) -> None:
    save_checkpoint(tmp_path, state(1))
    newest = save_checkpoint(tmp_path, state(2))
    content = newest.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    ends = {
        "nothing": 0,
        "the length word": 4,
        "the header": header // 2,
        "the middle": (header + len(content)) // 2,
        "all but a byte": len(content) - 1,
    }
    newest.write_bytes(content[: ends[length]])
    assert found(tmp_path) == 1


@pytest.mark.parametrize("place", ["length", "header", "tensors", "last"])
def test_a_checkpoint_with_one_flipped_bit_is_skipped_for_the_one_before_it(tmp_path: Path, place: str) -> None:
    save_checkpoint(tmp_path, state(1))
    newest = save_checkpoint(tmp_path, state(2))
    content = bytearray(newest.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[{"length": 0, "header": 20, "tensors": header + 5, "last": -1}[place]] ^= 1
    newest.write_bytes(content)
    assert found(tmp_path) == 1


def test_with_every_checkpoint_torn_the_run_says_so(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step)).write_bytes(b"torn")
    with pytest.raises(RunError, match="damaged"):
        found(tmp_path)
    assert found(tmp_path / "never made") is None


def test_only_the_last_two_stay(tmp_path: Path) -> None:
    written = [save_checkpoint(tmp_path, state(step)) for step in (0, 5, 10, 100)]
    assert set(tmp_path.iterdir()) == set(written[-2:])


def test_torn_checkpoints_of_later_steps_do_not_push_out_what_a_resumed_run_writes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    for step in (20, 30):
        save_checkpoint(tmp_path, state(step)).write_bytes(b"torn")
    save_checkpoint(tmp_path, state(2))
    assert found(tmp_path) == 2
    save_checkpoint(tmp_path, state(3)).unlink()
    assert found(tmp_path) == 2


def test_a_temporary_file_left_by_a_crash_is_no_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2)).rename(path.with_name("step-00000002-0123456789abcdef.tmp"))
    assert found(tmp_path) == 1


def test_a_checkpoint_under_another_name_is_not_trusted(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1))
    path.rename(path.with_name(f"step-00000007-{'0' * 16}.safetensors"))
    with pytest.raises(RunError, match="damaged"):
        found(tmp_path)


def test_a_run_directory_that_cannot_be_made_gives_one_line(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a file").touch()
    config = settings(None, rows, method="local", model=str(tiny_models["llama"]), steps=1)
    code, said = command_here(monkeypatch, capsys, "train", *as_flags(config), "--out", tmp_path / "a file" / "run")
    assert code == 13
    assert is_one_line(said), said
    assert "cannot be written" in said


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_words_and_with_a_report(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    run_here(settings(None, rows, method="local", model=str(tiny_models["llama"]), steps=1), out)
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").touch()
    code, said = command_here(monkeypatch, capsys, "train", "--resume", "--out", out)
    assert code == 13
    assert is_one_line(said), said
    assert "no checkpoint can be written" in said
    assert RunReport.load(out).status == "failed"
