"""What leaves on one stream: frames in their order, each counted, until the stream closes.

Knows frames, whose turn it is among them and how many wait; knows no requests and what no frame means.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable

from cloud_node.engine import Load
from cloud_node.watch import SessionWatch
from isthmus.ledger.memory import peak_bytes
from isthmus.wire.chunks import Outbox
from isthmus.wire.frames import Chunk, sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb

ServerFrames = Iterable[pb.ServerFrame | Chunk]


class Outgoing:
    """Waits for frames to send; of the event loop's thread alone.

    Attributes:
        sent: bytes of frames that have gone.
        closing: the stream closes once everything queued is sent.
    """

    def __init__(self, watch: SessionWatch, most: int) -> None:
        """Tell `watch` what is sent; there is room while at most so many messages wait."""
        self.sent = 0
        self.closing = False
        self._watch = watch
        self._most = most
        self._outbox: Outbox[pb.ServerFrame | Chunk] = Outbox()
        self._wake = asyncio.Event()
        self._left = asyncio.Event()

    def put(self, frames: ServerFrames, rank: int = 0) -> None:
        """Queue a message; see `Outbox.put`."""
        self._outbox.put(frames, rank)
        self._wake.set()

    def put_first(self, frame: pb.ServerFrame) -> None:
        """Queue a small control frame before all messages."""
        self._outbox.put_first(frame)
        self._wake.set()

    def close(self) -> None:
        """Close once everything queued is sent."""
        self.closing = True
        self._wake.set()

    async def frames(self) -> AsyncIterator[pb.ServerFrame | Chunk]:
        """The frames to send, until the stream has closed."""
        while True:
            frame = self._outbox.next()
            if frame is not None:
                size = sent_bytes(frame)
                self.sent += size
                self._watch.sent(size)
                self._left.set()
                yield frame
            elif self.closing:
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    async def room(self) -> None:
        """Wait while more waits to be sent than a client that reads would leave: one that does not is not read."""
        while len(self._outbox) > self._most and not self.closing:
            self._left.clear()
            await self._left.wait()


def tally_of(received: int, sent: int, load: Load) -> pb.Tally:
    """What a client is told of a stream that has moved so many bytes, and of the process behind it."""
    return pb.Tally(
        received_bytes=received,
        sent_bytes=sent,
        peak_tensor_bytes=load.peak_bytes,
        peak_memory_bytes=peak_bytes() or 0,
    )
