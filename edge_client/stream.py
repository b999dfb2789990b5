"""One gRPC stream of a session: what leaves, in turns; what arrives, in order; how many bytes each way.

Knows frames and bytes; knows nothing of what requests mean, nor of trying again.
"""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from edge_client.channel import open_channel
from edge_client.pacing import Pace
from edge_client.silence import Silence
from isthmus.errors import WireError
from isthmus.ledger.record import Ledger, Phase
from isthmus.trust.credentials import Credentials
from isthmus.wire import frames
from isthmus.wire.chunks import Outbox
from isthmus.wire.frames import Chunk, sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb

LOOK_EVERY_S = 2.0
"""How often a stream looks whether something moves on it."""


class Outgoing(NamedTuple):
    """A frame to send, the phase it is counted under, whether it was sent before, and the place it is counted at."""

    frame: pb.ClientFrame | Chunk
    phase: Phase = "control"
    again: bool = False
    at: str | None = None


class Counts(NamedTuple):
    """Bytes of a stream as one side counted them, and the other side's answer to the same question."""

    sent: int
    received: int
    tally: pb.Tally


@contextmanager
def waiting(ledger: Ledger, phase: Phase) -> Iterator[None]:
    """Count the seconds in here as waiting for the cloud."""
    began = time.perf_counter()
    try:
        yield
    finally:
        ledger.add(phase, edge_wait_s=time.perf_counter() - began)


class Stream:
    """Iterate it to read; any thread may `put`.

    Attributes:
        latest_bytes: of the frame that was read last, for whoever reads.
        silent: it was given up because the server gave no sign of life.
    """

    def __init__(self, address: str, credentials: Credentials | None, ledger: Ledger, pace: Pace | None = None) -> None:
        """Begin a stream, as slow as `pace` says; errors appear when it is read."""
        self._ledger = ledger
        self._outbox: Outbox[Outgoing] = Outbox()
        self._lock = threading.Condition()
        self._ended = False
        self._sent = 0
        self._received = 0
        self.latest_bytes = 0
        self.silent = False
        self._silence = Silence()
        self._closed = threading.Event()
        self._tallies: queue.Queue[Counts] = queue.Queue()
        self._asked: queue.Queue[int] = queue.Queue()
        self._channel = open_channel(address, credentials)
        exchange = self._channel.stream_stream(frames.EXCHANGE, frames.serialise, frames.read_server_frame)
        self._call = exchange(pace.upwards(self._frames(), sent_bytes) if pace is not None else self._frames())
        self._arriving = pace.downwards(self._call, sent_bytes) if pace is not None else self._call
        threading.Thread(target=self._watch, name="silence", daemon=True).start()

    @property
    def moved(self) -> float:
        """When something last moved on it but signs of life, on the clock of `time.monotonic`."""
        return self._silence.moved

    def put(self, message: Iterable[Outgoing], rank: int = 0) -> None:
        """Queue a message; see `Outbox.put`."""
        with self._lock:
            self._outbox.put(message, rank)
            self._lock.notify()

    def put_first(self, frame: pb.ClientFrame) -> None:
        """Queue a control frame before all messages."""
        with self._lock:
            self._outbox.put_first(Outgoing(frame))
            self._lock.notify()

    def __iter__(self) -> Iterator[pb.ServerFrame | Chunk]:
        """The frames that arrive, counted; ends when the server ends the stream, or raises grpc.RpcError."""
        for frame in self._arriving:
            self._silence.heard(not isinstance(frame, Chunk) and frame.WhichOneof("body") in ("heartbeat", "opened"))
            self.latest_bytes = sent_bytes(frame)
            self._received += self.latest_bytes
            yield frame
            if not isinstance(frame, Chunk) and frame.HasField("tally"):
                # After the yield, so that whoever waits for it finds the answer itself in the ledger. The server
                # counted before this answer, so it is not in either count.
                received = self._received - sent_bytes(frame)
                try:
                    self._tallies.put(Counts(self._asked.get_nowait(), received, frame.tally))
                except queue.Empty:
                    raise WireError("the server sent a count that nobody asked for") from None

    def compare(self, timeout_s: float) -> Counts | None:
        """Both sides' counts up to now; None if the server does not answer in time. Nothing else may be in flight."""
        self.put_first(pb.ClientFrame(tally=pb.Tally()))
        try:
            return self._tallies.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def stop_sending(self) -> None:
        """Send nothing more; answers to what was sent still arrive."""
        with self._lock:
            self._ended = True
            self._lock.notify()

    def close(self) -> None:
        """End the stream, whatever is on its way, and free the channel."""
        self._closed.set()
        self.stop_sending()
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._channel.close()

    def _frames(self) -> Iterator[pb.ClientFrame | Chunk]:
        while True:
            outgoing = self._next()
            if outgoing is None:
                return
            frame, phase, again, at = outgoing
            size = sent_bytes(frame)
            payload = len(frame.data) if isinstance(frame, Chunk) else 0
            resent = size if again else 0
            if at is None:
                self._ledger.add(phase, up_bytes=size, up_payload_bytes=payload, resent_bytes=resent)
            else:
                self._ledger.add_at(phase, at, up_bytes=size, up_payload_bytes=payload, resent_bytes=resent)
            self._sent += size
            if not isinstance(frame, Chunk) and frame.HasField("tally"):
                self._asked.put(self._sent)
            self._silence.left(not isinstance(frame, Chunk) and frame.HasField("heartbeat"))
            yield frame

    def _next(self) -> Outgoing | None:
        """Wait for the next frame."""
        with self._lock:
            while not self._ended:
                outgoing = self._outbox.next()
                if outgoing is not None:
                    return outgoing
                self._lock.wait()
            return None

    def _watch(self) -> None:
        """Ask for a sign of life in silence, and give the stream up where none comes."""
        while not self._closed.wait(LOOK_EVERY_S):
            due = self._silence.due()
            if due == "ask":
                self.put_first(pb.ClientFrame(heartbeat=pb.Heartbeat()))
            elif due == "give up":
                self.silent = True
                self._call.cancel()  # type: ignore[no-untyped-call]
                return
