"""Frames are exactly what protobuf writes and reads, copies aside."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from isthmus.wire.frames import PREFIX_BYTES, Chunk, read_client_frame, read_server_frame, sent_bytes, serialise
from isthmus.wire.gen import backbone_pb2 as pb

KEYS = st.builds(pb.Key, microbatch=st.integers(0, 2**64 - 1), pass_kind=st.sampled_from(pb.Pass.values()))
CHUNKS = st.builds(Chunk, KEYS, st.integers(0, 2**60), st.binary(min_size=1, max_size=400))


def by_protobuf(chunk: Chunk, kind: type) -> bytes:
    return kind(chunk=pb.Chunk(key=chunk.key, offset=chunk.offset, data=bytes(chunk.data))).SerializeToString()


@given(CHUNKS)
def test_a_chunk_is_written_as_protobuf_writes_it_in_either_frame(chunk: Chunk) -> None:
    assert serialise(chunk) == by_protobuf(chunk, pb.ClientFrame) == by_protobuf(chunk, pb.ServerFrame)
    assert sent_bytes(chunk) == len(serialise(chunk)) + PREFIX_BYTES


@given(CHUNKS)
def test_a_chunk_is_read_from_what_protobuf_writes(chunk: Chunk) -> None:
    for read, kind in ((read_client_frame, pb.ClientFrame), (read_server_frame, pb.ServerFrame)):
        found = read(by_protobuf(chunk, kind))
        assert isinstance(found, Chunk)
        assert (found.key, found.offset, bytes(found.data)) == (chunk.key, chunk.offset, chunk.data)


@given(CHUNKS)
def test_a_chunk_in_an_unusual_order_is_read_all_the_same(chunk: Chunk) -> None:
    usual = pb.Chunk(key=chunk.key, offset=chunk.offset).SerializeToString()
    inner = pb.Chunk(data=chunk.data).SerializeToString() + usual
    raw = bytes([0x1A]) + _varint(len(inner)) + inner
    found = read_client_frame(raw)
    assert isinstance(found, Chunk)
    assert (found.key, found.offset, bytes(found.data)) == (chunk.key, chunk.offset, chunk.data)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_protobuf_reads_them(raw: bytes) -> None:
    try:
        expected = pb.ClientFrame.FromString(raw)
    except DecodeError:
        with pytest.raises(DecodeError):
            read_client_frame(raw)
        return
    found = read_client_frame(raw)
    if expected.HasField("chunk"):
        assert isinstance(found, Chunk)
        assert (found.offset, bytes(found.data)) == (expected.chunk.offset, expected.chunk.data)
    else:
        assert found == expected


@given(st.data())
def test_a_mutated_chunk_is_read_as_protobuf_reads_it(data: st.DataObject) -> None:
    raw = bytearray(by_protobuf(data.draw(CHUNKS), pb.ClientFrame))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, min(len(raw) - 1, 40)))] = data.draw(st.integers(0, 255))
    test_any_bytes_are_read_as_protobuf_reads_them.hypothesis.inner_test(bytes(raw))


def test_other_frames_are_protobufs_own() -> None:
    frame = pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=7))
    assert serialise(frame) == frame.SerializeToString()
    assert read_client_frame(serialise(frame)) == frame
    assert sent_bytes(frame) == frame.ByteSize() + PREFIX_BYTES


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
