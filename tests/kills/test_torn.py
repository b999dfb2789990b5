"""Files of a run torn, emptied, lost or exchanged: the last good checkpoint serves, or the run says what to do."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edge_client.adapter_folder import _read as read_adapter
from edge_client.cache import OutputCache
from edge_client.runs import RunDirectory
from isthmus.errors import BundleError, IsthmusError, RunError
from isthmus.ledger.record import Ledger
from isthmus.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from isthmus.wire.tensors import pack
from tests.cache.by_hand import ORIGIN
from tests.faults.training import run_here
from tests.kills.cases import EVERYTHING
from tests.kills.disturbed import Place, check_whole, metrics
from tests.kills.forked import Forked

STRIDE = 1 if EVERYTHING else 7
"""Of a checkpoint's bytes every one is tried in `make kills`, and every seventh here."""


def state(step: int) -> Checkpoint:
    values = torch.arange(8, dtype=torch.float32) + step
    return Checkpoint(step, {"master/a": values, "step/a": torch.tensor(float(step))}, {"seconds": 0.5 * step})


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoints of steps 1 and 2."""
    return save_checkpoint(tmp_path, state(1)), save_checkpoint(tmp_path, state(2))


def assert_the_first_serves(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    found = load_checkpoint(directory)
    assert found is not None
    assert (found.step, found.facts["seconds"]) == (1, 0.5)
    assert torch.equal(found.tensors["master/a"], state(1).tensors["master/a"])
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "step-00000002" in warning.getMessage()


def test_torn_at_any_byte_or_with_any_byte_changed_the_one_before_it_serves(
    two: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, newest = two
    content = newest.read_bytes()
    for place in range(0, len(content), STRIDE):
        newest.write_bytes(content[:place])
        assert_the_first_serves(newest.parent, caplog)
        newest.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        assert_the_first_serves(newest.parent, caplog)
        newest.write_bytes(content[:place] + bytes(len(content) - place) + b"\0")  # blocks that were never written
        assert_the_first_serves(newest.parent, caplog)
    newest.write_bytes(content)
    found = load_checkpoint(newest.parent)
    assert found is not None
    assert found.step == 2


def test_what_is_no_file_or_cannot_be_one_is_passed_over(
    two: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, newest = two
    newest.unlink()
    newest.mkdir()
    assert_the_first_serves(newest.parent, caplog)
    newest.rmdir()
    newest.symlink_to("nowhere")
    assert_the_first_serves(newest.parent, caplog)


def test_the_newest_lost_or_all_lost(two: tuple[Path, Path]) -> None:
    oldest, newest = two
    newest.unlink()
    found = load_checkpoint(newest.parent)
    assert found is not None
    assert found.step == 1
    oldest.unlink()
    assert load_checkpoint(newest.parent) is None


def test_contents_exchanged_between_two_names_are_both_refused(two: tuple[Path, Path]) -> None:
    oldest, newest = two
    one, other = oldest.read_bytes(), newest.read_bytes()
    oldest.write_bytes(other)
    newest.write_bytes(one)
    with pytest.raises(RunError, match=r"every checkpoint in .* is damaged"):
        load_checkpoint(newest.parent)


@pytest.fixture
def stopped(place: Place, steady: Forked, tmp_path: Path) -> Path:
    """A run that was killed after step 5, with checkpoints of steps 2 and 4."""
    out = tmp_path / "run"
    edge = place.train(place.settings("split", steady.address, tmp_path), out, "metrics-written:5")
    edge.wait()
    assert sorted(path.name[:13] for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    return out


def resumed(out: Path) -> None:
    run_here(RunDirectory(out).config(), out, resume=True)


def test_a_run_whose_newest_checkpoint_is_torn_goes_on_from_the_one_before_it(
    stopped: Path, undisturbed: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    newest = max((stopped / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed(stopped)
    check_whole(stopped, undisturbed("split"))
    assert any(newest.name in record.getMessage() for record in caplog.records)


def test_a_run_that_lost_all_its_checkpoints_begins_anew_and_says_so(
    place: Place, stopped: Path, undisturbed: Callable[..., Path]
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    again = place.resume(stopped)
    assert again.wait() == 0, again.said
    assert "the run begins anew" in again.said
    check_whole(stopped, undisturbed("split"))


def test_checkpoints_of_another_run_of_other_settings_are_refused(
    place: Place, steady: Forked, stopped: Path, tmp_path: Path
) -> None:
    config = place.settings("split", steady.address, tmp_path, lr=0.5)
    run_here(config, tmp_path / "other")
    shutil.rmtree(stopped / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", stopped / "checkpoints")
    with pytest.raises(RunError, match="the settings is not what this run began with"):
        resumed(stopped)


def test_metrics_and_ledger_torn_anywhere_in_their_last_lines_go_on_without_what_was_torn(
    stopped: Path, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("metrics.jsonl", "ledger.jsonl"):
        content = (stopped / name).read_bytes()
        begin = content.rstrip(b"\n").rfind(b"\n") + 1
        for end in range(begin, len(content) + 1, STRIDE):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(stopped, copy)
            (copy / name).write_bytes(content[:end])
            RunDirectory(copy).resume(4)
            assert [line["step"] for line in metrics(copy)] == [1, 2, 3, 4]
            assert (copy / "ledger.jsonl").read_bytes() in (content[:begin], content) or name == "metrics.jsonl"
    (stopped / "metrics.jsonl").write_bytes((stopped / "metrics.jsonl").read_bytes()[:-9])
    (stopped / "ledger.jsonl").write_bytes((stopped / "ledger.jsonl").read_bytes()[:-9])
    resumed(stopped)
    check_whole(stopped, undisturbed("split"))


def test_a_ledger_damaged_in_its_middle_is_refused_by_line(stopped: Path) -> None:
    lines = (stopped / "ledger.jsonl").read_bytes().split(b"\n")
    lines[1] = lines[1][: len(lines[1]) // 2]
    (stopped / "ledger.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(RunError, match=r"ledger\.jsonl:2: not a line of a ledger"):
        Ledger.resume(stopped / "ledger.jsonl")


def test_metrics_damaged_in_their_middle_lose_that_line_with_a_warning(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = (stopped / "metrics.jsonl").read_bytes().split(b"\n")
    lines[1] = b"\xff\x00" + lines[1][5:]
    (stopped / "metrics.jsonl").write_bytes(b"\n".join(lines))
    RunDirectory(stopped).resume(4)
    assert [line["step"] for line in metrics(stopped)] == [1, 3, 4]
    assert any("line 2 of" in record.getMessage() for record in caplog.records)


def generated(place: Place, out: Path) -> Forked:
    flags = ("generate", "--run", out, "--prompt", "a")
    return place.forking.start("edge_client", *flags, ISTHMUS_CACHE=str(place.cache))


def test_a_torn_adapter_is_refused_and_a_changed_one_warned_of_and_resuming_writes_it_again(
    undisturbed: Callable[..., Path], tmp_path: Path, place: Place
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed("split"), out)
    weights = out / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    for end in (0, 4, 100, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:end])
        with pytest.raises(BundleError, match="cannot be read"):
            read_adapter(weights)
    weights.write_bytes(content[: len(content) // 2])
    assert generated(place, out).wait() == BundleError.exit_code
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = generated(place, out)
    assert changed.wait() == 0, changed.said
    assert "is not what run.json was written of" in " ".join(changed.said.split())
    resumed(out)
    check_whole(out, undisturbed("split"))


def test_a_kept_output_torn_at_any_byte_is_fetched_again(tmp_path: Path) -> None:
    cache, key = OutputCache(tmp_path / "kept", 1 << 20, ORIGIN), "a" * 64
    value = torch.arange(12.0).reshape(3, 4)
    cache.put(key, [pack(value, "none")])
    (entry,) = (tmp_path / "kept").rglob("*.safetensors")
    content = entry.read_bytes()
    for place in range(0, len(content), STRIDE):
        for torn in (content[:place], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
            entry.parent.mkdir(parents=True, exist_ok=True)
            entry.write_bytes(torn)
            found = cache.get(key)
            assert found is None or torch.equal(found[0], value)  # a byte that only pads the header
            assert (found is None) != entry.exists()
    cache.put(key, [pack(value, "none")])
    found = cache.get(key)
    assert found is not None
    assert torch.equal(found[0], value)


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_settings_or_a_report_that_are_torn_are_refused_in_one_line(
    place: Place, undisturbed: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed("split"), out)
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(IsthmusError) as refused:
        RunDirectory(out).placed()
    assert name in str(refused.value)
