"""Chunks put together give back what was split, and every other sequence of chunks is refused."""

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import WireError
from isthmus.wire.chunks import CHUNK_BYTES, MAX_TENSORS, Assembly, split
from isthmus.wire.frames import Chunk, read_client_frame, serialise
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack
from tests.wire.drawn import bits, carried

KEY = pb.Key(microbatch=3, pass_kind=pb.PASS_FORWARD)
LIMIT = 1 << 23


def carried_over(chunk: Chunk) -> Chunk:
    """The chunk as a peer reads it."""
    found = read_client_frame(serialise(chunk))
    assert isinstance(found, Chunk)
    return found


def sent(*cases: tuple[torch.Tensor, str]) -> tuple[list[pb.Tensor], list[Chunk]]:
    packed = [pack(tensor, codec) for tensor, codec in cases]
    return [header for header, _ in packed], list(split(KEY, [payload for _, payload in packed]))


def three_chunks() -> tuple[list[pb.Tensor], list[Chunk]]:
    return sent((torch.arange(CHUNK_BYTES * 5 // 8, dtype=torch.int32), "none"))


@settings(max_examples=60, deadline=None)
@given(st.lists(carried(), max_size=MAX_TENSORS))
def test_tensors_arrive_whatever_stands_beside_them(cases: list[tuple[torch.Tensor, str]]) -> None:
    headers, chunks = sent(*cases)
    assembly = Assembly(headers, LIMIT)
    for chunk in chunks:
        assert not assembly.complete
        assembly.add(carried_over(chunk))
    assert assembly.complete
    for back, (tensor, codec) in zip(assembly.tensors(), cases, strict=True):
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        if codec == "none":
            assert bits(back) == bits(tensor)


def test_a_large_tensor_travels_in_chunks_of_at_most_a_mebibyte_that_name_their_message_and_place() -> None:
    tensor = torch.arange(CHUNK_BYTES * 5 // 8, dtype=torch.int32)
    headers, chunks = sent((tensor, "none"), (torch.ones(3), "bf16"))
    assert [len(chunk.data) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES // 2, 6]
    assert [chunk.offset for chunk in chunks] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES, CHUNK_BYTES * 5 // 2]
    assert all(chunk.key == KEY for chunk in chunks)
    assembly = Assembly(headers, LIMIT)
    for chunk in chunks:
        assembly.add(chunk)
    assert torch.equal(assembly.tensors()[0], tensor)


def test_an_empty_tensor_needs_no_chunk() -> None:
    headers, chunks = sent((torch.empty(0, 5), "int8"))
    assert chunks == []
    assert Assembly(headers, LIMIT).tensors()[0].shape == (0, 5)


def test_chunks_are_made_only_as_they_are_taken() -> None:
    payload = memoryview(bytearray(64 * CHUNK_BYTES))
    tracemalloc.start()
    next(split(KEY, [payload]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * CHUNK_BYTES


@pytest.mark.parametrize(
    ("order", "says"),
    [([1], "gap"), ([0, 2], "gap"), ([0, 0], "repeats"), ([0, 1, 0], "repeats"), ([0, 1, 2, 2], "repeats")],
)
def test_chunks_out_of_order_are_refused(order: list[int], says: str) -> None:
    headers, chunks = three_chunks()
    assembly = Assembly(headers, LIMIT)
    for index in order[:-1]:
        assembly.add(chunks[index])
    with pytest.raises(WireError, match=says):
        assembly.add(chunks[order[-1]])


@pytest.mark.parametrize("offset", [1, 2**40, 2**64 - 1])
def test_an_absurd_offset_is_a_gap(offset: int) -> None:
    headers, _ = three_chunks()
    with pytest.raises(WireError, match="gap"):
        Assembly(headers, LIMIT).add(Chunk(KEY, offset, b"x"))


def test_more_bytes_than_declared_are_refused() -> None:
    headers, chunks = three_chunks()
    assembly = Assembly(headers, LIMIT)
    for chunk in chunks[:2]:
        assembly.add(chunk)
    chunks[2] = chunks[2]._replace(data=bytes(chunks[2].data) + b"x")
    with pytest.raises(WireError, match="headers declare"):
        assembly.add(chunks[2])
    assert not assembly.complete


def test_an_empty_chunk_is_refused() -> None:
    headers, _ = three_chunks()
    with pytest.raises(WireError, match="empty"):
        Assembly(headers, LIMIT).add(Chunk(KEY, 0, b""))


def test_a_truncated_message_yields_no_tensors() -> None:
    headers, chunks = three_chunks()
    assembly = Assembly(headers, LIMIT)
    for chunk in chunks[:-1]:
        assembly.add(chunk)
    with pytest.raises(WireError, match="send the rest"):
        assembly.tensors()


def test_a_corrupted_chunk_is_noticed() -> None:
    headers, chunks = three_chunks()
    damaged = bytearray(chunks[1].data)
    damaged[777] ^= 16
    chunks[1] = chunks[1]._replace(data=bytes(damaged))
    assembly = Assembly(headers, LIMIT)
    for chunk in chunks:
        assembly.add(chunk)
    with pytest.raises(WireError, match="checksum"):
        assembly.tensors()


def claim(elements: int, codec: str = "none", dtype: str = "float32", size: int | None = None) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=[elements], codec=codec, size=4 * elements if size is None else size)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([claim(2**28)], id="one too large"),
        pytest.param([claim(2**19)] * 5, id="together too large"),
        pytest.param([claim(2**19, "bf16", "float64", 2**20)] * 3, id="together too large once decoded"),
        pytest.param([claim(2**18)] * 7 + [claim(8, size=2**20)], id="the last one lies"),
        pytest.param([claim(0)] * (MAX_TENSORS + 1), id="too many"),
        pytest.param([claim(2**63, size=0)], id="absurd"),
    ],
)
def test_headers_are_refused_before_anything_large_is_allocated(headers: list[pb.Tensor]) -> None:
    tracemalloc.start()
    with pytest.raises(WireError):
        Assembly(headers, LIMIT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_headers_that_fill_the_limit_exactly_are_taken() -> None:
    Assembly([claim(2**18)] * 8, LIMIT)
