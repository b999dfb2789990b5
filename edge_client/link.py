"""The line to a cloud node: a session whose requests survive the streams that carry them.

Knows requests, answers and when trying again can help; knows no model and no training. What is pending when a
stream breaks is sent again on the next: requests are pure functions, so nothing is lost and nothing happens twice.
"""

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import torch

from edge_client.pacing import Pace
from edge_client.stream import Counts, Outgoing, Stream
from isthmus.errors import IsthmusError, LimitError, UnreachableError, WireError
from isthmus.ledger.record import Ledger, Phase
from isthmus.trust.address import split_address
from isthmus.trust.credentials import Credentials, diagnose
from isthmus.wire.chunks import Assembly, split
from isthmus.wire.frames import Chunk, sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.status import read_failure, read_status
from isthmus.wire.tensors import Encoded, unpack

PATIENCE_S = 120.0
"""How long a session that was open waits for a server to come back."""

BACKOFF_S = (0.2, 5.0)
"""First and longest wait between attempts to reconnect, each jittered by half."""

_LOST = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
)

PASS_OF = {
    pb.PASS_FORWARD_PORT: pb.PASS_FORWARD,
    pb.PASS_BACKWARD_PORT: pb.PASS_BACKWARD,
    pb.PASS_DECODE_PORT: pb.PASS_DECODE,
}
"""The pass that asks at its ports."""

ANSWERING = 4
"""Questions at ports that are answered at once; each is a few small matrix products."""

RequestId = tuple[int, int]
Answer = Callable[[pb.PortCall, list[torch.Tensor]], list[Encoded]]
"""Answers what a running request asks at its ports: the question and its tensors to the tensors that are due."""


@dataclass
class Received:
    """An answer: its tensors on the CPU and as they crossed, whether activations wait, and what it cost the cloud."""

    tensors: list[torch.Tensor]
    encoded: list[Encoded]
    kept: bool
    cost: pb.Cost


@dataclass
class _Pending:
    call: pb.Call
    payloads: list[memoryview]
    phase: Phase
    size: int  # bytes that count against the server's limits
    answer: "Answer | None" = None
    future: "Future[Received]" = field(default_factory=Future)
    reply: pb.Reply | None = None
    assembly: Assembly | None = None
    asked: "tuple[pb.PortCall, Assembly] | None" = None
    sent: bool = False

    @property
    def most_tensors(self) -> int:
        """Tensors that an answer may have: output and taps, of each row where rows are answered apart."""
        return 2 * len(self.call.rows.row_lengths) if self.call.apart else 2

    def frames(self) -> Iterator[Outgoing]:
        """What to send, the second time marked so."""
        again = self.sent
        yield Outgoing(pb.ClientFrame(call=self.call), self.phase, again)
        self.sent = True  # reached when the frame above has left the queue
        for chunk in split(self.call.key, self.payloads):
            yield Outgoing(chunk, self.phase, again)


@dataclass(frozen=True)
class Agreement:
    """Both sides' byte counts over the streams that could be compared, and how many could not."""

    edge_sent: int
    edge_received: int
    cloud_sent: int
    cloud_received: int
    unchecked_streams: int

    @property
    def equal(self) -> bool:
        """Whether each side received exactly what the other says it sent."""
        return (self.edge_sent, self.edge_received) == (self.cloud_received, self.cloud_sent)


def explain(error: grpc.RpcError, address: str, credentials: Credentials | None) -> IsthmusError:
    """What a failed call means: the server's own error, else what one handshake outside gRPC finds."""
    named = read_status(error.details())
    if named is not None:
        return named
    if error.code() in _LOST:
        found = diagnose(*split_address(address), credentials)
        return found or UnreachableError(
            f"{address} broke the connection ({error.details()}); check that a cloud node is running there"
        )
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return WireError(f"{address} is not an Isthmus cloud node; check the address")
    return WireError(f"{address} answered {error.code().name}: {error.details()}")


class Link:
    """One session. Any thread may `request`; a thread of its own reads and reconnects."""

    def __init__(
        self,
        address: str,
        credentials: Credentials | None,
        opening: pb.Open,
        ledger: Ledger,
        limits: pb.Limits,
        patience_s: float = PATIENCE_S,
        pace: Pace | None = None,
    ) -> None:
        """Describe the session; `limits` are the server's: what is beyond them waits here. `pace` slows the line."""
        self._address = address
        self._credentials = credentials
        self._opening = opening
        self._ledger = ledger
        self._call_bytes = limits.call_bytes
        self._calls_in_flight = limits.calls_in_flight
        self._patience_s = patience_s
        self._pace = pace
        self._lock = threading.Condition()
        self._pending: dict[RequestId, _Pending] = {}
        self._ended: IsthmusError | None = None
        self._unchecked = 0
        self._stream: Stream | None = None
        self._keeper: threading.Thread | None = None  # none before the first request, nor after an idle loss
        self.opened = False  # whether there ever was a session
        self._opening_lock = threading.Lock()
        self._answering = ThreadPoolExecutor(ANSWERING, thread_name_prefix="ports")

    def open(self) -> None:
        """Connect and open the session, unless that is done; the first request does it too.

        Raises:
            IsthmusError: whatever refuses it; UnreachableError if nothing answers.
        """
        with self._opening_lock:
            if self._keeper is None and self._ended is None:
                stream = self._patiently(UnreachableError("it went away")) if self.opened else self._connect()
                if stream is not None:
                    self._begin(stream)
        if self._ended is not None:
            raise self._ended

    def _begin(self, stream: Stream) -> None:
        with self._lock:
            if self._ended is not None:  # closed meanwhile
                stream.close()
                return
            self.opened, self._stream = True, stream
            self._keeper = threading.Thread(target=self._keep, args=(stream,), name="link", daemon=True)
            self._keeper.start()

    def request(
        self,
        call: pb.Call,
        payloads: list[memoryview],
        phase: Phase,
        answer_bytes: int = 0,
        answer: Answer | None = None,
    ) -> "Future[Received]":
        """Send a request; the future gives its answer or raises the error that the cloud named.

        The payloads must not change until the answer is there; `answer_bytes` says how large that may be where it is
        larger than they are. `answer` is called, by other threads, for what the request asks at its ports.

        Raises:
            LimitError: it is larger than the server accepts.
            IsthmusError: the link is closed or has failed.
        """
        size = max(sum(payload.nbytes for payload in payloads), answer_bytes)
        pending = _Pending(call, payloads, phase, size, answer)
        if pending.size > self._call_bytes:
            raise LimitError(f"a request of more than {self._call_bytes} bytes is not accepted; use smaller batches")
        while not self._put(pending):
            self.open()
        return pending.future

    def _put(self, pending: _Pending) -> bool:
        """Queue a request once there is room for it; False where there is no session to queue it in."""
        with self._lock:
            while self._ended is None and self._keeper is not None and self._full(pending.size):
                self._lock.wait()
            if self._ended is not None:
                raise self._ended
            if self._keeper is None:
                return False
            self._pending[_request_id(pending.call.key)] = pending
            if self._stream is not None:
                self._stream.put(pending.frames())
            return True

    def _full(self, more: int) -> bool:
        """Whether the server's limits leave no room for `more` bytes beside what is pending; holds the lock."""
        if len(self._pending) >= self._calls_in_flight:
            return True
        held = sum(pending.size for pending in self._pending.values())
        return bool(self._pending) and held + more > self._call_bytes

    def release(self, keys: list[pb.Key], sequences: list[str]) -> None:
        """Tell the cloud what it need not keep; nothing is lost if this never arrives."""
        with self._lock:
            if self._stream is not None:
                self._stream.put_first(pb.ClientFrame(release=pb.Release(keys=keys, sequences=sequences)))

    def compare_counts(self, timeout_s: float = 10.0) -> Agreement:
        """Ask the cloud for its own count of the present stream. Nothing else may be in flight."""
        with self._lock:
            stream = self._stream
        counts = stream.compare(timeout_s) if stream is not None else None
        if counts is None:
            with self._lock:  # a stream that is gone has been counted already
                unanswered = int(stream is not None and stream is self._stream)
                return Agreement(0, 0, 0, 0, self._unchecked + unanswered)
        self._ledger.peak("cloud_peak_tensor_bytes", counts.tally.peak_tensor_bytes)
        self._ledger.peak("cloud_peak_memory_bytes", counts.tally.peak_memory_bytes)
        return _agreement(counts, self._unchecked)

    def close(self) -> None:
        """End the session; whatever still waits for an answer fails."""
        self._fail(UnreachableError("the session is closed"))
        self._answering.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None and self._keeper is not None:
            stream.stop_sending()  # so that the server ends it in good order and frees the session at once
            self._keeper.join(timeout=2)
            stream.close()

    def _keep(self, first: Stream) -> None:
        """Read the stream until it ends; reconnect while that may help."""
        stream: Stream | None = first
        while stream is not None:
            error = self._read(stream)
            stream.close()
            with self._lock:
                self._stream = None
                self._unchecked += 1
            stream = self._revive(error)

    def _read(self, stream: Stream) -> IsthmusError:
        """Handle what arrives; returns why the stream ended."""
        try:
            for frame in stream:
                self._handle(stream, frame)
        except grpc.RpcError as error:
            if self._ended is not None:
                return self._ended
            return explain(error, self._address, self._credentials)
        except IsthmusError as error:
            return error
        except ValueError as error:  # figures that cannot be: a peer's word, so the session ends with it
            return WireError(f"{self._address} sent what cannot be counted: {error}")
        return UnreachableError(f"{self._address} ended the session")

    def _handle(self, stream: Stream, frame: pb.ServerFrame | Chunk) -> None:
        payload = len(frame.data) if isinstance(frame, Chunk) else 0
        part = frame if isinstance(frame, Chunk) else frame.port if frame.HasField("port") else frame.reply
        with self._lock:
            pending = self._pending.get(_request_id(part.key))
        phase: Phase = pending.phase if pending is not None else "control"
        self._ledger.add(phase, down_bytes=sent_bytes(frame), down_payload_bytes=payload)
        if pending is not None and not isinstance(part, pb.Reply) and _at_port(part):
            self._be_asked(stream, pending, part, sent_bytes(frame))
        elif pending is not None and not isinstance(part, pb.PortCall):
            self._take(pending, part)
        elif not isinstance(frame, Chunk):
            if frame.HasField("failure"):
                raise read_failure(frame.failure)
            if frame.HasField("drain") and not self._answers_ports():
                stream.stop_sending()

    def _answers_ports(self) -> bool:
        """Whether a request under way may still ask."""
        with self._lock:
            return any(pending.answer is not None for pending in self._pending.values())

    def _be_asked(self, stream: Stream, pending: _Pending, asked: pb.PortCall | Chunk, size: int) -> None:
        """Add to the question that it belongs to; one that breaks the contract fails its request alone."""
        try:
            if isinstance(asked, pb.PortCall):
                if pending.answer is None:
                    raise WireError(f"{self._address} asks at ports that were not opened")
                pending.asked = (asked, Assembly(asked.tensors, self._call_bytes))
            elif pending.asked is None:
                raise WireError(f"{self._address} sent a chunk before the question that it belongs to")
            else:
                pending.asked[1].add(asked)
            question, assembly = pending.asked
            self._ledger.add(pending.phase, at=_place(question), down_bytes=size)
            if assembly.complete:
                pending.asked = None
                self._answering.submit(self._reply, stream, pending, question, assembly)
        except (WireError, RuntimeError) as error:  # the latter where the link was closed meanwhile
            self._finish(pending, error if isinstance(error, WireError) else UnreachableError("the session is closed"))

    def _reply(self, stream: Stream, pending: _Pending, question: pb.PortCall, assembly: Assembly) -> None:
        """Answer a question on the stream that brought it; on another it is asked again."""
        if pending.answer is None:
            return
        try:
            encoded = pending.answer(question, assembly.tensors())
        except IsthmusError as error:
            self._finish(pending, error)
            return
        except Exception as error:  # noqa: BLE001 (whoever waits for the request shall see it)
            self._raise(pending, error)
            return
        headers = [header for header, _ in encoded]
        frame = pb.ClientFrame(port=pb.PortAnswer(key=question.key, turn=question.turn, tensors=headers))
        place = _place(question)
        self._ledger.add(pending.phase, round_trips=1)
        self._ledger.add(pending.phase, at=place, round_trips=1)
        parts = itertools.chain[pb.ClientFrame | Chunk]((frame,), split(question.key, [data for _, data in encoded]))
        stream.put(Outgoing(part, pending.phase, at=place) for part in parts)

    def _raise(self, pending: _Pending, error: Exception) -> None:
        with self._lock:
            self._pending.pop(_request_id(pending.call.key), None)
            self._lock.notify_all()
        if not pending.future.done():
            pending.future.set_exception(error)

    def _take(self, pending: _Pending, answer: pb.Reply | Chunk) -> None:
        """Add to the answer that it belongs to; an answer that breaks the contract fails its request alone."""
        try:
            if isinstance(answer, Chunk):
                if pending.assembly is None:
                    raise WireError(f"{self._address} sent a chunk before the answer that it belongs to")
                pending.assembly.add(answer)
            elif answer.HasField("failure"):
                error = read_failure(answer.failure)
                if not error.retryable:  # else the request goes out again on the next stream
                    self._finish(pending, error)
                return
            else:
                assembly = Assembly(answer.tensors, self._call_bytes, pending.most_tensors)
                pending.reply, pending.assembly = answer, assembly
            if pending.reply is not None and pending.assembly is not None and pending.assembly.complete:
                encoded = pending.assembly.encoded()
                tensors = [unpack(header, payload, self._call_bytes) for header, payload in encoded]
                self._count(pending.phase, pending.reply.cost)
                self._finish(pending, Received(tensors, encoded, pending.reply.kept, pending.reply.cost))
        except WireError as error:
            self._finish(pending, error)

    def _count(self, phase: Phase, cost: pb.Cost) -> None:
        self._ledger.add(
            phase,
            round_trips=1,
            recomputed_calls=int(cost.recompute_flops > 0),
            cloud_forward_flops=cost.forward_flops,
            cloud_backward_flops=cost.backward_flops,
            cloud_recompute_flops=cost.recompute_flops,
            cloud_forward_s=cost.forward_s,
            cloud_backward_s=cost.backward_s,
            cloud_queue_s=cost.queue_s,
            cloud_port_s=cost.port_s,
        )

    def _finish(self, pending: _Pending, outcome: Received | IsthmusError) -> None:
        with self._lock:
            self._pending.pop(_request_id(pending.call.key), None)
            self._lock.notify_all()
        if pending.future.done():
            return  # the link was closed meanwhile
        if isinstance(outcome, IsthmusError):
            pending.future.set_exception(outcome)
        else:
            pending.future.set_result(outcome)

    def _revive(self, error: IsthmusError) -> Stream | None:
        """Reconnect, if anything is waiting for it; else the next request does."""
        with self._lock:
            if error.retryable and not self._pending and self._ended is None:
                self._keeper = None
                return None
        return self._patiently(error)

    def _patiently(self, error: IsthmusError) -> Stream | None:
        """Reconnect and send again what is pending, while the error allows and patience lasts; else fail it all."""
        wait_s, lost = BACKOFF_S[0], time.monotonic()
        while error.retryable and time.monotonic() - lost < self._patience_s:
            with self._lock:
                if self._ended is None:
                    self._lock.wait(wait_s * random.uniform(0.5, 1.5))  # noqa: S311 (jitter, not secrecy)
                if self._ended is not None:
                    return None
            wait_s = min(2 * wait_s, BACKOFF_S[1])
            try:
                return self._resume(self._connect())
            except IsthmusError as refused:
                error = refused
        if error.retryable:
            error = UnreachableError(f"no answer for {self._patience_s:.0f} s ({error}); resume when it is back")
        self._fail(error)
        return None

    def _resume(self, stream: Stream) -> Stream:
        with self._lock:
            if self._ended is not None:
                stream.close()
                raise self._ended
            self._stream = stream
            for pending in self._pending.values():
                pending.reply = pending.assembly = pending.asked = None
                stream.put(pending.frames())
        return stream

    def _fail(self, error: IsthmusError) -> None:
        with self._lock:
            self._ended = self._ended or error
            pending, self._pending = list(self._pending.values()), {}
            self._lock.notify_all()
        for request in pending:
            request.future.set_exception(error)

    def _connect(self) -> Stream:
        stream = Stream(self._address, self._credentials, self._ledger, self._pace)
        stream.put([Outgoing(pb.ClientFrame(open=self._opening))])
        try:
            first = next(iter(stream), None)
        except grpc.RpcError as error:
            stream.close()
            raise explain(error, self._address, self._credentials) from None
        if isinstance(first, pb.ServerFrame) and first.HasField("opened"):
            self._ledger.add("control", down_bytes=sent_bytes(first))
            return stream
        stream.close()
        if isinstance(first, pb.ServerFrame) and first.HasField("failure"):
            raise read_failure(first.failure)
        raise UnreachableError(f"{self._address} ended the session before it began")


def _agreement(counts: Counts, unchecked: int) -> Agreement:
    tally = counts.tally
    return Agreement(counts.sent, counts.received, tally.sent_bytes, tally.received_bytes, unchecked)


def _request_id(key: pb.Key) -> RequestId:
    """The request that a frame belongs to, what it asks at its ports included."""
    return key.microbatch, PASS_OF.get(key.pass_kind, key.pass_kind)


def _at_port(part: pb.PortCall | Chunk) -> bool:
    return isinstance(part, pb.PortCall) or part.key.pass_kind in PASS_OF


def _place(question: pb.PortCall) -> str:
    return str(question.block)
