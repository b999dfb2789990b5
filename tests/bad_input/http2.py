"""HTTP/2 by hand (RFC 9113), for what no gRPC client would send.

Knows frames and the plainest header encoding (RFC 7541, literals without indexing); knows nothing of the contract.
"""

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
ACK, END_HEADERS = 1, 4
REFUSED_STREAM, ENHANCE_YOUR_CALM = 7, 11
MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE = 3, 6
WITHIN_S = 30.0


class Frame(NamedTuple):
    kind: int
    stream: int
    flags: int
    payload: bytes


def frame(kind: int, stream: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def literal(name: str, value: str) -> bytes:
    return b"\0" + _text(name) + _text(value)


def call(method: str, *more: bytes) -> bytes:
    """The headers of a gRPC call."""
    usual = {":method": "POST", ":scheme": "http", ":path": f"/isthmus.v1.Backbone/{method}", ":authority": "x"}
    usual |= {"te": "trailers", "content-type": "application/grpc"}
    return b"".join(literal(name, value) for name, value in usual.items()) + b"".join(more)


def _text(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes((len(data),)) + data
    rest, prefix = len(data) - 127, bytearray((127,))
    while rest >= 128:
        prefix.append(rest % 128 + 128)
        rest //= 128
    return bytes((*prefix, rest)) + data


class Connection:
    """A connection whose preface is sent."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=WITHIN_S)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS))

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *frames: bytes) -> None:
        """Send as much as the peer takes."""
        try:
            self.socket.sendall(b"".join(frames))
        except OSError:
            return

    def frames(self) -> Iterator[Frame]:
        """What comes until the peer ends the connection; TimeoutError where it does neither."""
        while (head := self._exactly(9)) is not None:
            size = int.from_bytes(head[:3], "big")
            payload = self._exactly(size) or b""
            yield Frame(head[3], int.from_bytes(head[5:], "big"), head[4], payload)

    def until(self, kind: int) -> Frame:
        """The next frame of a kind."""
        return next(each for each in self.frames() if each.kind == kind and not (kind == SETTINGS and each.flags & 1))

    def _exactly(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            try:
                more = self.socket.recv(size - len(data))
            except ConnectionError:
                return None
            if not more:
                return None
            data += more
        return data


def settings(payload: bytes) -> dict[int, int]:
    return {int(key): int(value) for key, value in struct.iter_unpack(">HI", payload)}


def code(sent: Frame) -> int:
    """Of a GOAWAY or RST_STREAM."""
    return int.from_bytes(sent.payload[4:8] if sent.kind == GOAWAY else sent.payload[:4], "big")
