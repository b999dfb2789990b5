"""A damaged, foreign or lying entry never comes back: it is removed, and can be put again."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from edge_client.cache import Origin, OutputCache
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack
from tests.cache.by_hand import KEY, ORIGIN, OTHER_KEY, OTHERS, PLENTY, encoded, equal, file_of, stands


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
