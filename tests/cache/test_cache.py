"""An entry comes back exactly as it crossed the wire or not at all, whatever happens to its file or beside it."""

import errno
import json
import multiprocessing
import os
import random
import stat
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from edge_client.cache import Origin, OutputCache, row_key
from isthmus.errors import RunError
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import Encoded, pack, unpack

ORIGIN = Origin("ab" * 32, "2:2", "bf16", "int8", "float32", "bfloat16", ("3:64", "5:64"), True, "torch 1", "torch 2")
OTHERS = [
    replace(ORIGIN, model_digest="cd" * 32),
    replace(ORIGIN, cut="2:3"),
    replace(ORIGIN, codec="none"),
    replace(ORIGIN, codec_port="bf16"),
    replace(ORIGIN, edge_dtype="bfloat16"),
    replace(ORIGIN, span_dtype="float32"),
    replace(ORIGIN, ports=("3:64",)),
    replace(ORIGIN, ports=("5:64", "3:64")),
    replace(ORIGIN, deterministic=False),
    replace(ORIGIN, edge_runtime="torch 3"),
    replace(ORIGIN, span_runtime="torch 3"),
]
PLENTY = 1 << 30
KEY, OTHER_KEY = row_key([1, 2, 3], 0, None, False), row_key([1, 2, 4], 0, None, False)


def encoded(number: int = 0, codec: str = "none", shape: tuple[int, ...] = (3, 50)) -> Encoded:
    """A tensor that only `number` decides, as it crossed."""
    return pack(torch.randn(shape, generator=torch.Generator().manual_seed(number)), codec)


def decoded(sent: Encoded) -> torch.Tensor:
    """What a receiver makes of it without a cache."""
    return unpack(sent[0], bytearray(sent[1]), PLENTY)


def stands(cache: OutputCache, key: str) -> bool:
    """Whether there is a file for it, whole or not."""
    return cache._path(key).is_file()


def equal(got: list[torch.Tensor] | None, sent: list[Encoded]) -> bool:
    """Whether an entry holds exactly these, type and shape included."""
    wanted = [decoded(one) for one in sent]
    return got is not None and len(got) == len(wanted) and all(map(same, got, wanted))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def file_of(directory: Path, key: str = KEY) -> Path:
    """Where the one entry of this key stands."""
    (path,) = directory.glob(f"*/{key[:2]}/{key}.safetensors")
    return path


def used(path: Path, seconds_ago: float) -> None:
    os.utime(path, (time.time() - seconds_ago,) * 2)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


# What comes back


@pytest.mark.parametrize("codec", ["none", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("shapes", [[(3, 50)], [(1, 5, 64), (5, 7), (), (0, 4)], []])
def test_an_entry_comes_back_bit_for_bit_as_it_crossed(
    tmp_path: Path, codec: str, shapes: list[tuple[int, ...]]
) -> None:
    sent = [encoded(number, codec, shape) for number, shape in enumerate(shapes)]
    OutputCache(tmp_path, PLENTY, ORIGIN).put(KEY, sent)
    opened_later = OutputCache(tmp_path, PLENTY, ORIGIN)
    assert stands(opened_later, KEY)
    assert equal(opened_later.get(KEY), sent)


def test_types_that_only_cross_as_they_are_come_back_too(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    sent = [pack(torch.arange(9), "none"), pack(torch.randn(9).bfloat16(), "none"), pack(torch.ones(3).bool(), "none")]
    cache.put(KEY, sent)
    assert equal(cache.get(KEY), sent)


def test_a_received_buffer_can_be_kept_and_what_comes_back_is_its_readers_own(tmp_path: Path) -> None:
    cache, (header, payload) = OutputCache(tmp_path, PLENTY, ORIGIN), encoded()
    cache.put(KEY, [(header, memoryview(bytearray(b"before" + bytes(payload)))[6:])])
    first = cache.get(KEY)
    assert first is not None
    first[0].zero_()
    assert equal(cache.get(KEY), [(header, payload)])


def test_an_entry_holds_the_payload_as_it_crossed_in_a_file_that_any_safetensors_reader_opens(tmp_path: Path) -> None:
    header, payload = encoded(codec="int8")
    OutputCache(tmp_path, PLENTY, ORIGIN).put(KEY, [(header, payload)])
    with safe_open(file_of(tmp_path), framework="np") as stored:
        assert stored.get_tensor("0").tobytes() == bytes(payload)
        assert stored.metadata()["format"] == "isthmus-outputs/1"
        assert stored.metadata()["key"] == KEY
        assert json.loads(stored.metadata()["origin"])["model_digest"] == ORIGIN.model_digest


def test_what_was_never_put_is_not_there(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    cache.put(OTHER_KEY, [encoded()])
    assert not stands(cache, KEY)
    assert cache.get(KEY) is None


def test_an_entry_put_again_is_the_last_one_put(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    for number in (1, 2):
        cache.put(KEY, [encoded(number)])
    assert equal(cache.get(KEY), [encoded(2)])


# Keys


ROWS = st.tuples(
    st.lists(st.integers(0, 12), max_size=3),
    st.integers(0, 3),
    st.none() | st.lists(st.booleans(), max_size=3),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(ROWS, ROWS)
def test_keys_are_the_same_exactly_for_the_same_row(
    one: tuple[list[int], int, list[bool] | None, bool], other: tuple[list[int], int, list[bool] | None, bool]
) -> None:
    assert (row_key(*one) == row_key(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (([1, 23], 0, None, False), ([12, 3], 0, None, False)),
        (([1], 2, None, False), ([1, 2], 0, None, False)),
        (([], 1, None, False), ([1], 0, None, False)),
        (([1], 0, None, False), ([1], 0, [], False)),
        (([1], 0, None, False), ([1], 0, [True], False)),
        (([1, 2], 0, [True, False], False), ([1, 2], 0, [False, True], False)),
    ],
)
def test_rows_that_look_alike_have_different_keys(one: Any, other: Any) -> None:
    assert row_key(*one) != row_key(*other)


def test_a_row_has_one_key_whatever_holds_it() -> None:
    ids, wanted = torch.tensor([5, 6]), torch.tensor([True, False])
    assert row_key(tuple(ids), 3, tuple(wanted), False) == row_key([5, 6], 3, [True, False], False)


@pytest.mark.parametrize("other", OTHERS)
def test_an_entry_of_any_other_origin_is_not_there(tmp_path: Path, other: Origin) -> None:
    OutputCache(tmp_path, PLENTY, ORIGIN).put(KEY, [encoded()])
    assert not stands(OutputCache(tmp_path, PLENTY, other), KEY)
    assert OutputCache(tmp_path, PLENTY, other).get(KEY) is None
    assert stands(OutputCache(tmp_path, PLENTY, ORIGIN), KEY)


# Damage


def rewritten(path: Path, about: dict[str, str | None], extra: bool = False, kept: bool = True) -> None:
    """The entry as a well-formed safetensors file with other metadata (None: without), or other tensors."""
    with safe_open(path, framework="np") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
        metadata = {**stored.metadata(), **about}
    if extra:
        tensors["1"] = tensors["0"]
    save_file(tensors if kept else {}, path, {name: text for name, text in metadata.items() if text is not None})


def turned_header() -> str:
    """The header of the damaged entry, but for its shape."""
    header, _ = encoded(codec="bf16")
    header.shape[:] = reversed(header.shape)
    return header.SerializeToString(deterministic=True).hex()


def in_place_of(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def with_content(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "a few bytes": lambda path: path.write_bytes(b"\x01\x02"),
    "zeros": lambda path: with_content(path, lambda content: bytes(len(content))),
    "a header of absurd length": lambda path: with_content(path, lambda content: b"\xff" * 7 + b"\x7f" + content[8:]),
    "torn in the header": lambda path: with_content(path, lambda content: content[:100]),
    "torn in the payload": lambda path: with_content(path, lambda content: content[:-100]),
    "one byte short": lambda path: with_content(path, lambda content: content[:-1]),
    "one byte long": lambda path: with_content(path, lambda content: content + b"\0"),
    "the last bit flipped": lambda path: with_content(path, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "a directory": lambda path: in_place_of(path, lambda path: (path / "deep").mkdir(parents=True)),
    "a named pipe": lambda path: in_place_of(path, os.mkfifo),
    "a link to nothing": lambda path: in_place_of(path, lambda path: path.symlink_to("nowhere")),
    "a link to itself": lambda path: in_place_of(path, lambda path: path.symlink_to(path)),
    "no metadata": lambda path: in_place_of(path, lambda path: save_file({}, path)),
    "no tensors": lambda path: rewritten(path, {}, kept=False),
    "a tensor too many": lambda path: rewritten(path, {}, extra=True),
    "another format": lambda path: rewritten(path, {"format": "isthmus-outputs/2"}),
    "another key": lambda path: rewritten(path, {"key": OTHER_KEY}),
    "another origin": lambda path: rewritten(path, {"origin": "{}"}),
    "other headers": lambda path: rewritten(path, {"headers": encoded()[0].SerializeToString().hex()}),
    "a header of another shape of the same size": lambda path: rewritten(path, {"headers": turned_header()}),
    "no headers": lambda path: rewritten(path, {"headers": None}),
    "no checksum": lambda path: rewritten(path, {"checksum": None}),
    "bytes as other numbers": lambda path: with_content(path, lambda content: content.replace(b'"U8"', b'"I8"')),
    "bytes as numbers that NumPy lacks": lambda path: with_content(
        path, lambda content: content.replace(b'"U8","shape"', b'"F8_E4M3","shape"').replace(b" " * 5, b"", 1)
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_not_returned_but_removed_and_can_be_put_again(tmp_path: Path, name: str) -> None:
    cache, sent = OutputCache(tmp_path, PLENTY, ORIGIN), [encoded(codec="bf16")]
    cache.put(KEY, sent)
    path = file_of(tmp_path)
    DAMAGE[name](path)
    assert cache.get(KEY) is None
    assert not os.path.lexists(path)
    cache.put(KEY, sent)
    assert equal(cache.get(KEY), sent)


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_any_other_origin_copied_here_is_removed(tmp_path: Path, other: Origin) -> None:
    cache = OutputCache(tmp_path / "here", PLENTY, ORIGIN)
    cache.put(KEY, [encoded(1)])
    OutputCache(tmp_path / "there", PLENTY, other).put(KEY, [encoded(2)])
    file_of(tmp_path / "there").replace(file_of(tmp_path / "here"))
    assert cache.get(KEY) is None
    assert not stands(cache, KEY)


def test_a_file_of_another_key_copied_here_is_removed(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    cache.put(KEY, [encoded(1)])
    cache.put(OTHER_KEY, [encoded(2)])
    file_of(tmp_path, OTHER_KEY).replace(file_of(tmp_path, KEY))
    assert cache.get(KEY) is None
    assert not stands(cache, KEY)


LIES: list[dict[str, Any]] = [
    {"shape": [2**63, 2], "size": 0},
    {"shape": [2**38], "size": 2**40},
    {"shape": [2**39, 2**39, 0], "size": 0},
    {"shape": [50, 3], "size": 2**64 - 1},
    {"shape": [1] * 100_000},
    {"shape": [5, 50]},
    {"dtype": "complex64"},
    {"dtype": "float64"},
    {"codec": "gzip"},
    {"codec": "int8"},
    {"checksum": 7},
]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_header_that_lies_is_refused_before_anything_is_allocated_for_it(tmp_path: Path, lie: dict[str, Any]) -> None:
    cache, (header, payload) = OutputCache(tmp_path, PLENTY, ORIGIN), encoded()
    for field in lie:
        header.ClearField(field)
    header.MergeFrom(pb.Tensor(**lie))
    cache.put(KEY, [(header, payload)])
    tracemalloc.start()
    assert cache.get(KEY) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    assert not stands(cache, KEY)


def test_a_value_that_is_not_finite_is_refused_though_every_checksum_is_right(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    header, payload = pack(torch.tensor([0x7FC00000], dtype=torch.int32), "none")
    header.dtype = "float32"
    cache.put(KEY, [(header, payload)])
    assert cache.get(KEY) is None
    assert not stands(cache, KEY)


def test_a_file_larger_than_the_whole_cache_may_be_is_not_read(tmp_path: Path) -> None:
    OutputCache(tmp_path, PLENTY, ORIGIN).put(KEY, [encoded()])
    assert OutputCache(tmp_path, file_of(tmp_path).stat().st_size - 1, ORIGIN).get(KEY) is None
    assert not list(tmp_path.rglob("*.safetensors"))


SENT = [encoded(0, "none", (2, 3)), encoded(1, "int8", (70,)), encoded(2, "bf16", (0, 1))]


@settings(max_examples=250, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
def test_whatever_byte_is_changed_the_answer_is_nothing_or_exactly_what_was_put(
    place: float, change: int, in_payload: bool
) -> None:
    with TemporaryDirectory() as directory:
        cache = OutputCache(Path(directory), PLENTY, ORIGIN)
        cache.put(KEY, SENT)
        path = file_of(Path(directory))
        content = bytearray(path.read_bytes())
        payload = sum(header.size for header, _ in SENT)
        content[-1 - int(place * payload) if in_payload else int(place * (len(content) - payload))] ^= change
        path.write_bytes(content)
        got = cache.get(KEY)
        assert got is None or equal(got, SENT)
        assert stands(cache, KEY) == (got is not None)
        if in_payload:
            assert got is None


# The limit


KEYS = [row_key([number], 0, None, False) for number in range(100)]


def entry_size(directory: Path) -> int:
    """What each entry of `encoded()`'s shape takes on disk."""
    OutputCache(directory, PLENTY, ORIGIN).put(KEY, [encoded()])
    return file_of(directory).stat().st_size


def test_the_least_recently_used_go_first_whatever_their_origin(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    one, two = (OutputCache(tmp_path / "cache", 10 * size, origin) for origin in (ORIGIN, OTHERS[0]))
    for number in range(10):
        cache = one if number % 2 else two
        cache.put(KEYS[number], [encoded(number)])
        used(file_of(tmp_path / "cache", KEYS[number]), 100 - number)
    assert equal(two.get(KEYS[0]), [encoded(0)])
    one.put(KEYS[10], [encoded(10)])
    there = [number for number in range(11) if stands(one, KEYS[number]) or stands(two, KEYS[number])]
    assert there == [0, 3, 4, 5, 6, 7, 8, 9, 10]


def test_the_directory_never_exceeds_the_limit_and_an_eviction_leaves_nine_tenths(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    place, limit = tmp_path / "cache", 40 * size + size // 2
    cache, sizes = OutputCache(place, limit, ORIGIN), []
    for key in KEYS:
        cache.put(key, [encoded()])
        assert cache.get(key) is not None
        sizes.append(size_of(place))
    assert max(sizes) <= limit
    after_evictions = [now for before, now in pairwise(sizes) if now < before]
    assert after_evictions
    assert set(after_evictions) == {36 * size}


def test_a_cache_that_is_full_of_what_others_put_counts_it(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    place = tmp_path / "cache"
    one, two = (OutputCache(place, 20 * size, ORIGIN) for _ in range(2))
    for number in range(0, 80, 2):
        one.put(KEYS[number], [encoded()])
        two.put(KEYS[number + 1], [encoded()])
        assert size_of(place) <= 22 * size


def test_an_entry_larger_than_the_limit_is_not_kept_and_pushes_nothing_out(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, 10_000, ORIGIN)
    cache.put(KEY, [encoded()])
    cache.put(OTHER_KEY, [encoded(shape=(100, 100))])
    assert not stands(cache, OTHER_KEY)
    assert stands(cache, KEY)


def test_an_entry_between_nine_tenths_and_the_limit_is_kept_alone(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    cache = OutputCache(tmp_path / "cache", size, ORIGIN)
    for key in KEYS[:3]:
        cache.put(key, [encoded()])
        assert cache.get(key) is not None
        assert size_of(tmp_path / "cache") == size


def test_nothing_that_is_not_the_caches_own_is_counted_or_removed(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    place = tmp_path / "cache"
    foreign = [place / "model.safetensors", place / "0123456789abcdef" / "ab" / "notes.txt"]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10 * size))
        used(path, 1e6)
    cache = OutputCache(place, 3 * size, ORIGIN)
    for key in KEYS[:3]:
        cache.put(key, [encoded()])
    assert all(path.exists() for path in foreign)
    assert all(stands(cache, key) for key in KEYS[:3])


def test_drafts_of_a_crash_go_after_an_hour_and_younger_ones_stay(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    cache.put(KEY, [encoded()])
    old, young = (file_of(tmp_path).with_name(f"{KEY}.safetensors.{number * 8}.tmp") for number in "01")
    for draft, age in ((old, 3700), (young, 3500)):
        draft.touch()
        used(draft, age)
    OutputCache(tmp_path, PLENTY, ORIGIN).put(OTHER_KEY, [encoded()])
    assert not old.exists()
    assert young.exists()
    assert stands(cache, KEY)


def test_an_eviction_leaves_what_another_process_is_writing(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    cache = OutputCache(tmp_path / "cache", 4 * size, ORIGIN)
    cache.put(KEY, [encoded()])
    draft = file_of(tmp_path / "cache").with_name(f"{KEY}.safetensors.00000000.tmp")
    draft.write_bytes(bytes(size))
    used(draft, 3500)
    for key in KEYS[:6]:
        cache.put(key, [encoded()])
        assert size_of(tmp_path / "cache") <= 4 * size
    assert draft.exists()


def test_making_a_cache_reads_none_of_its_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OutputCache(tmp_path, PLENTY, ORIGIN).put(KEY, [encoded()])

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(os, "scandir", refuse)
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    assert stands(cache, KEY)
    assert cache.get(KEY) is not None


# Two processes


def hammer(directory: Path, limit: int, seed: int) -> tuple[int, int]:
    """Put and get keys that another process puts and gets; the gets that found their entry, and those that did not."""
    torch.set_num_threads(1)
    draws = random.Random(seed)
    entries = [[encoded(number), encoded(number, "int8", (number, 40))] for number in range(12)]
    cache, hits, misses = OutputCache(directory, limit, ORIGIN), 0, 0
    for _ in range(800):
        number = draws.randrange(12)
        if draws.random() < 0.5:
            cache.put(KEYS[number], entries[number])
            continue
        got = cache.get(KEYS[number])
        if got is not None and not equal(got, entries[number]):
            raise AssertionError(f"a wrong tensor for {number}")
        hits, misses = hits + (got is not None), misses + (got is None)
    return hits, misses


def test_two_processes_share_a_directory_under_a_tight_limit(tmp_path: Path) -> None:
    limit = 12_000
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        for hits, misses in processes.map(hammer, [tmp_path] * 2, [limit] * 2, [1, 2]):
            assert hits > 100
            assert misses > 100
    assert size_of(tmp_path) <= 1.3 * limit
    assert not list(tmp_path.rglob("*.tmp"))


# The disk


def test_only_the_owner_can_read_the_cache(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    umask = os.umask(0)
    try:
        OutputCache(place, PLENTY, ORIGIN).put(KEY, [encoded()])
    finally:
        os.umask(umask)
    folders = [place, *(path for path in place.rglob("*") if path.is_dir())]
    assert len(folders) == 3
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert stat.S_IMODE(file_of(place).stat().st_mode) == 0o600


def full_until(directory: Path, remaining: int, monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
    """A disk that takes no further entry while `directory` holds more than `remaining`."""
    replaced = Path.replace

    def refuse(draft: Path, target: Path) -> Path:
        if len(list(directory.rglob("*.safetensors"))) > remaining:
            raise OSError(code, os.strerror(code))
        return replaced(draft, target)

    monkeypatch.setattr(Path, "replace", refuse)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_the_older_half_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    for age, key in enumerate(KEYS[:10]):
        cache.put(key, [encoded()])
        used(file_of(tmp_path, key), age)
    full_until(tmp_path, 5, monkeypatch, code)
    cache.put(KEY, [encoded(1)])
    assert equal(cache.get(KEY), [encoded(1)])
    assert [stands(cache, key) for key in KEYS[:10]] == [True] * 5 + [False] * 5


def test_a_disk_that_stays_full_gives_one_line_that_says_what_to_do_and_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    for key in KEYS[:4]:
        cache.put(key, [encoded()])
    full_until(tmp_path, -1, monkeypatch)
    with pytest.raises(RunError, match=r"(?i)no space left.*free some space, or give another --cache") as error:
        cache.put(KEY, [encoded()])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))
    assert sum(stands(cache, key) for key in KEYS[:4]) == 2


def test_a_disk_that_refuses_for_another_reason_costs_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    cache.put(OTHER_KEY, [encoded()])
    full_until(tmp_path, -1, monkeypatch, errno.EROFS)
    with pytest.raises(RunError, match="another --cache"):
        cache.put(KEY, [encoded()])
    assert equal(cache.get(OTHER_KEY), [encoded()])


def test_a_directory_that_cannot_be_made_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(RunError, match=r"cannot be written .* another --cache"):
        OutputCache(tmp_path / "a file" / "cache", PLENTY, ORIGIN)
    with pytest.raises(RunError, match=r"cannot be written .* another --cache"):
        OutputCache(tmp_path / "a file", PLENTY, ORIGIN)


def test_a_cache_that_may_only_be_read_still_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    cache.put(KEY, [encoded()])

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    assert equal(cache.get(KEY), [encoded()])
