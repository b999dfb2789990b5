"""Sealed checkpoints and sealed outputs: as good as plain ones when whole, and as little trusted when damaged."""

from pathlib import Path

import pytest
import torch

from edge_client.cache import OutputCache
from isthmus.errors import RunError
from isthmus.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from isthmus.trust.sealing import ENDING, HEADER_BYTES, Seal
from tests.cache.by_hand import KEY, ORIGIN, OTHER_KEY, PLENTY, encoded, equal

SEAL = Seal.new()


def state(step: int) -> Checkpoint:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(step))
    return Checkpoint(step, {"master/a": values, "b": values.bfloat16(), "c": torch.tensor(step)}, {"loss": 0.1 + step})


def found(directory: Path, seal: Seal | None = SEAL) -> int | None:
    checkpoint = load_checkpoint(directory, seal)
    if checkpoint is not None:
        wanted = state(checkpoint.step)
        assert checkpoint.tensors.keys() == wanted.tensors.keys()
        for name, value in wanted.tensors.items():
            assert checkpoint.tensors[name].dtype == value.dtype
            assert torch.equal(checkpoint.tensors[name], value)
        assert checkpoint.facts["loss"] == wanted.facts["loss"]
    return checkpoint and checkpoint.step


def test_a_sealed_checkpoint_comes_back_bit_for_bit_and_two_are_kept(tmp_path: Path) -> None:
    written = [save_checkpoint(tmp_path, state(step), SEAL) for step in (1, 5, 9)]
    assert set(tmp_path.iterdir()) == set(written[1:])
    assert all(path.suffix == ENDING for path in written)
    assert found(tmp_path) == 9


@pytest.mark.parametrize("kept", [0, 4, HEADER_BYTES - 1, HEADER_BYTES, 0.5, -1])
def test_one_that_was_torn_anywhere_is_skipped_for_the_one_before_it(tmp_path: Path, kept: float) -> None:
    save_checkpoint(tmp_path, state(1), SEAL)
    newest = save_checkpoint(tmp_path, state(2), SEAL)
    content = newest.read_bytes()
    newest.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else int(kept)])
    assert found(tmp_path) == 1


@pytest.mark.parametrize("place", [0, 9, 30, HEADER_BYTES - 1, HEADER_BYTES, -1])
def test_one_with_a_flipped_bit_is_skipped_for_the_one_before_it(tmp_path: Path, place: int) -> None:
    save_checkpoint(tmp_path, state(1), SEAL)
    newest = save_checkpoint(tmp_path, state(2), SEAL)
    content = bytearray(newest.read_bytes())
    content[place] ^= 1
    newest.write_bytes(content)
    assert found(tmp_path) == 1
    save_checkpoint(tmp_path, state(3), SEAL)
    assert found(tmp_path) == 3


def test_an_old_one_under_a_newer_name_is_not_trusted(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), SEAL)
    path.rename(path.with_name(f"step-00000007-{'0' * 16}.safetensors{ENDING}"))
    with pytest.raises(RunError, match="damaged"):
        found(tmp_path)


def test_plain_ones_are_not_taken_by_a_sealed_run_nor_sealed_ones_by_a_plain_run(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "plain", state(1))
    save_checkpoint(tmp_path / "sealed", state(1), SEAL)
    with pytest.raises(RunError, match="sealed"):
        found(tmp_path / "plain")
    with pytest.raises(RunError, match="sealed"):
        found(tmp_path / "sealed", None)


def test_an_entry_comes_back_and_neither_its_file_nor_its_name_tells_of_the_row(tmp_path: Path) -> None:
    sent = [encoded(1), encoded(2, "int8")]
    OutputCache(tmp_path, PLENTY, ORIGIN, SEAL).put(KEY, sent)
    assert equal(OutputCache(tmp_path, PLENTY, ORIGIN, SEAL).get(KEY), sent)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in str(path)
    assert bytes(sent[0][1])[:16] not in path.read_bytes()
    assert OutputCache(tmp_path, PLENTY, ORIGIN, Seal.new()).get(KEY) is None
    assert OutputCache(tmp_path, PLENTY, ORIGIN).get(KEY) is None


def test_a_damaged_entry_or_another_rows_is_removed_and_can_be_put_again(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN, SEAL)
    cache.put(OTHER_KEY, [encoded(7)])
    for damage in ("cut off", "a bit", "another row's", "plain"):
        cache.put(KEY, [encoded(1)])
        path = cache._path(KEY)
        content = bytearray(path.read_bytes())
        if damage == "cut off":
            del content[-1]
        elif damage == "a bit":
            content[len(content) // 2] ^= 1
        elif damage == "another row's":
            content[:] = cache._path(OTHER_KEY).read_bytes()
        else:
            content[:] = b"".join(Seal.new().sealed("", [b"plain"]))
        path.write_bytes(content)
        assert cache.get(KEY) is None
        assert not path.exists()
    assert equal(cache.get(OTHER_KEY), [encoded(7)])


def test_sealed_entries_count_towards_the_limit_and_the_oldest_go_first(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN, SEAL)
    cache.put(KEY, [encoded(1)])
    size = cache._path(KEY).stat().st_size
    small = OutputCache(tmp_path, int(1.5 * size), ORIGIN, SEAL)
    small.put(OTHER_KEY, [encoded(2)])
    assert small.get(KEY) is None
    assert equal(small.get(OTHER_KEY), [encoded(2)])
