"""Frames as bytes: protobuf's own encoding, but for chunks without its copies.

Knows the contract's field numbers of one message, `Chunk` inside a frame, and leaves every other to protobuf. What
is written here is exactly what protobuf writes; what is read here in an order that protobuf never writes goes to
protobuf. A chunk's bytes are copied once on their way out and not at all on their way in.
"""

from typing import NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from isthmus.wire.gen import backbone_pb2 as pb

PREFIX_BYTES = 5
"""gRPC frames each message with a flag and a length; counted as sent on both sides."""

# Tag bytes, (field number << 3) | wire type, of the fields that make up a chunk inside a frame.
_FRAME_CHUNK, _CHUNK_KEY, _CHUNK_OFFSET, _CHUNK_DATA = 0x1A, 0x0A, 0x10, 0x1A


Frame = TypeVar("Frame", pb.ClientFrame, pb.ServerFrame)


class Chunk(NamedTuple):
    """A piece of a message's payload, as `pb.Chunk`, whose bytes stay where they are."""

    key: pb.Key
    offset: int
    data: memoryview | bytes


EXCHANGE = "/isthmus.v1.Backbone/Exchange"
"""The call whose frames these are."""


def serialise(frame: "pb.ClientFrame | pb.ServerFrame | Chunk") -> bytes:
    """The frame as protobuf writes it."""
    if not isinstance(frame, Chunk):
        return frame.SerializeToString()
    head = _head(frame)
    outer = bytes([_FRAME_CHUNK]) + _varint(len(head) + len(frame.data))
    return b"".join((outer, head, frame.data))


def read_client_frame(raw: bytes) -> "pb.ClientFrame | Chunk":
    """What an edge sent.

    Raises:
        DecodeError: it is no frame.
    """
    return _chunk_of(raw) or _unwrapped(pb.ClientFrame.FromString(raw))


def read_server_frame(raw: bytes) -> "pb.ServerFrame | Chunk":
    """What a cloud sent.

    Raises:
        DecodeError: it is no frame.
    """
    return _chunk_of(raw) or _unwrapped(pb.ServerFrame.FromString(raw))


def sent_bytes(message: "Message | Chunk") -> int:
    """Bytes of a message as gRPC sends it."""
    if not isinstance(message, Chunk):
        return message.ByteSize() + PREFIX_BYTES
    key, data = message.key.ByteSize(), len(message.data)
    offset = 1 + _width(message.offset) if message.offset else 0
    inner = 1 + _width(key) + key + offset + 1 + _width(data) + data
    return 1 + _width(inner) + inner + PREFIX_BYTES


def _unwrapped(frame: Frame) -> "Frame | Chunk":
    """A chunk that came in an unusual order is a chunk all the same."""
    if frame.HasField("chunk"):
        return Chunk(frame.chunk.key, frame.chunk.offset, frame.chunk.data)
    return frame


def _head(chunk: Chunk) -> bytes:
    """A chunk up to its data's first byte; fields with their default value are left out, as protobuf does."""
    key = chunk.key.SerializeToString()
    offset = bytes([_CHUNK_OFFSET]) + _varint(chunk.offset) if chunk.offset else b""
    return bytes([_CHUNK_KEY]) + _varint(len(key)) + key + offset + bytes([_CHUNK_DATA]) + _varint(len(chunk.data))


def _chunk_of(raw: bytes) -> Chunk | None:
    """The chunk in a frame; None where this is no frame with a chunk, or not one in protobuf's usual order."""
    if raw[:1] != bytes([_FRAME_CHUNK]):
        return None
    try:
        length, at = _read_varint(raw, 1)
        if raw[at] != _CHUNK_KEY or at + length != len(raw):
            return None
        length, at = _read_varint(raw, at + 1)
        key, at = pb.Key.FromString(raw[at : at + length]), at + length
        offset = 0
        if raw[at] == _CHUNK_OFFSET:
            offset, at = _read_varint(raw, at + 1)
        if raw[at] != _CHUNK_DATA:
            return None
        length, at = _read_varint(raw, at + 1)
    except (IndexError, DecodeError):
        return None
    return Chunk(key, offset, memoryview(raw)[at:]) if at + length == len(raw) else None


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _width(number: int) -> int:
    """Bytes of a number as `_varint` writes it."""
    return (number.bit_length() + 6) // 7 or 1


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number and where the next field begins; one of more than 9 bytes is left to protobuf."""
    number = 0
    for shift in range(0, 63, 7):
        byte = raw[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return number, at
    raise IndexError
