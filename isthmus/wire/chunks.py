"""Payloads in chunks of about 1 MiB, and many messages taking turns so that none blocks another.

Knows bytes, offsets and order. It refuses to know streams, threads and what a message means.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from isthmus.errors import WireError
from isthmus.wire.frames import Chunk
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.options import CHUNK_BYTES
from isthmus.wire.tensors import Encoded, check, decoded_size, unpack

MAX_TENSORS = 8
LARGE_PIECE = CHUNK_BYTES // 16

Frame = TypeVar("Frame")


def split(key: pb.Key, payloads: Sequence[memoryview]) -> Iterator[Chunk]:
    """The chunks of a message, made one at a time as they are taken.

    Offsets run through the payloads laid end to end. A chunk never spans two payloads; an empty payload has none.
    """
    base = 0
    for payload in payloads:
        for start in range(0, payload.nbytes, CHUNK_BYTES):
            yield Chunk(key, base + start, payload[start : start + CHUNK_BYTES])
        base += payload.nbytes


class Assembly:
    """The tensors of one message while their chunks arrive, in order, into memory that grows with what is here."""

    def __init__(self, headers: Sequence[pb.Tensor], max_bytes: int, max_tensors: int = MAX_TENSORS) -> None:
        """Judge every header, and what they need together. Nothing is allocated for what is only declared.

        Raises:
            WireError: too many tensors, a header that fails `tensors.check`, or a total encoded or decoded size
                beyond `max_bytes`.
        """
        if len(headers) > max_tensors:
            raise WireError(f"message has {len(headers)} tensors; {max_tensors} are allowed")
        for header in headers:
            check(header, max_bytes)
        size = sum(header.size for header in headers)
        if max(size, sum(decoded_size(header) for header in headers)) > max_bytes:
            raise WireError(f"message needs more than the {max_bytes} bytes allowed; send smaller batches")
        self._headers = tuple(headers)
        self._max_bytes = max_bytes
        self._size = size
        self._received = 0
        self._parts: list[memoryview | bytes | bytearray] = []

    @property
    def complete(self) -> bool:
        """Whether every declared byte is here."""
        return self._received == self._size

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk; its key is the caller's to match.

        Raises:
            WireError: the chunk is empty, leaves a gap, repeats bytes or exceeds what the headers declared.
        """
        data, received = chunk.data, self._received
        end = received + len(data)
        if chunk.offset != received:
            fault = "leaves a gap" if chunk.offset > received else "repeats bytes"
            raise WireError(f"chunk at {chunk.offset} {fault}; send from {received} in order")
        if not data:
            raise WireError(f"chunk at {chunk.offset} is empty; send none for nothing")
        if end > self._size:
            raise WireError(f"chunk ends at {end} where the headers declare {self._size} bytes")
        self._received = end
        self._store(data)

    def _store(self, data: memoryview | bytes) -> None:
        """Keep large pieces as they are, to be joined once; a rain of small ones costs no more than its bytes."""
        if len(data) >= LARGE_PIECE:
            self._parts.append(data)
        elif self._parts and isinstance(self._parts[-1], bytearray):
            self._parts[-1] += data
        else:
            self._parts.append(bytearray(data))

    def tensors(self) -> list[torch.Tensor]:
        """The message's tensors, on the CPU. They may share this assembly's memory, so take them once.

        Raises:
            WireError: chunks are missing, or a payload fails `tensors.unpack`.
        """
        return [unpack(header, payload, self._max_bytes) for header, payload in self.encoded()]

    def encoded(self) -> list[Encoded]:
        """The message's tensors as they crossed, each payload a view of one memory; take them once.

        Raises:
            WireError: chunks are missing.
        """
        if not self.complete:
            raise WireError(f"message has {self._received} of {self._size} bytes; send the rest first")
        view = memoryview(bytearray().join(self._parts))
        self._parts = []
        found = []
        for header in self._headers:
            found.append((header, view[: header.size]))
            view = view[header.size :]
        return found


class Outbox(Generic[Frame]):
    """A fair queue: the messages in it take turns, frame by frame, and each keeps its own order.

    A message is its frames, the header (Call or Reply) first, then its chunks. One frame of each waiting message
    is made ahead, so that an outbox knows when it is empty. Not thread-safe: whoever shares it holds a lock.
    """

    def __init__(self) -> None:
        self._urgent: deque[Frame] = deque()
        self._messages: dict[int, deque[tuple[Frame, Iterator[Frame]]]] = {}

    def put(self, frames: Iterable[Frame], rank: int = 0) -> None:
        """Queue a message behind those of its rank; one without frames is nothing.

        Messages take turns with those of their rank, and wait while there are any of a lower one.
        """
        rest = iter(frames)
        for frame in rest:
            self._messages.setdefault(rank, deque()).append((frame, rest))
            return

    def put_first(self, frame: Frame) -> None:
        """Queue a small control frame, such as a heartbeat, before all messages and after earlier control frames."""
        self._urgent.append(frame)

    def next(self) -> Frame | None:
        """Take the frame whose turn it is, and send its message to the back; None when nothing waits."""
        if self._urgent:
            return self._urgent.popleft()
        if not self._messages:
            return None
        rank = min(self._messages)
        frame, rest = self._messages[rank].popleft()
        self.put(rest, rank)
        if not self._messages[rank]:
            del self._messages[rank]
        return frame

    def __len__(self) -> int:
        """Messages and control frames that still have something to send."""
        return len(self._urgent) + sum(map(len, self._messages.values()))
