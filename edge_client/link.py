"""The line to a cloud node: a session whose requests survive the streams that carry them.

Knows requests, answers and when trying again can help; knows no model and no training. What is pending when a
stream breaks is sent again on the next: requests are pure functions, so nothing is lost and nothing happens twice.
"""

import itertools
import threading
import time
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import grpc

from edge_client.channel import explain
from edge_client.pacing import Pace
from edge_client.pending import Answer, Pending, Received, RequestId, at_port, place_of, request_id
from edge_client.retrying import PATIENCE_S, SOONEST_S, Retrying, retry_after
from edge_client.stream import Counts, Outgoing, Stream
from isthmus.errors import CertificateError, IsthmusError, LimitError, UnreachableError, WireError
from isthmus.ledger.record import Ledger, Phase
from isthmus.trust.credentials import Credentials
from isthmus.wire.chunks import Assembly, split
from isthmus.wire.frames import Chunk, sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.status import read_failure

FIRST_S = 5.0
"""How long a session's beginning is tried again: who waits for it wants to know soon that nobody is there."""

ANSWERING = 4
"""Questions at ports that are answered at once; each is a few small matrix products."""


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


SOON_S: Final = 2.0
"""When a request goes out again that a server refused for now and did not say until when."""


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
        retrying: Retrying | None = None,
    ) -> None:
        """Describe the session; `limits` are the server's: what is beyond them waits here. `pace` slows the line."""
        self._address = address
        self._credentials = credentials
        self._opening = opening
        self._ledger = ledger
        self._call_bytes = limits.call_bytes
        self._calls_in_flight = limits.calls_in_flight
        self._retrying = retrying or Retrying(patience_s)
        self._pace = pace
        self._lock = threading.Condition()
        self._pending: dict[RequestId, Pending] = {}
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
                stream = self._again() if self.opened else self._first()
                if stream is not None:
                    self._begin(stream)
        if self._ended is not None:
            raise self._ended

    def _again(self) -> Stream | None:
        self._retrying.began()
        return self._patiently(UnreachableError("it went away"))

    def _first(self) -> Stream | None:
        """A session that never was is tried for `FIRST_S`, or until the server has room if it says when that is."""
        self._retrying.began()
        until = time.monotonic() + FIRST_S
        while True:
            try:
                return self._connect()
            except IsthmusError as error:
                if retry_after(error) is not None:
                    return self._patiently(error)
                wait_s = self._retrying.pause(error)
                if wait_s is None or time.monotonic() + wait_s > until:
                    raise
            with self._lock:
                self._retrying.wait(self._lock, lambda: self._ended is not None, wait_s)
                if self._ended is not None:
                    return None

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
        most_tensors: int | None = None,
    ) -> "Future[Received]":
        """Send a request; the future gives its answer or raises the error that the cloud named.

        The payloads must not change until the answer is there; `answer_bytes` says how large that may be where it is
        larger than they are. `answer` is called, by other threads, for what the request asks at its ports.
        `most_tensors` are in its answer where that is not a pass's.

        Raises:
            LimitError: it is larger than the server accepts.
            IsthmusError: the link is closed or has failed.
        """
        size = max(sum(payload.nbytes for payload in payloads), answer_bytes)
        pending = Pending(call, payloads, phase, size, answer, due=most_tensors)
        if pending.size > self._call_bytes:
            raise LimitError(f"a request of more than {self._call_bytes} bytes is not accepted; use smaller batches")
        while not self._put(pending):
            self.open()
        return pending.future

    def _put(self, pending: Pending) -> bool:
        """Queue a request once there is room for it; False where there is no session to queue it in."""
        with self._lock:
            while self._ended is None and self._keeper is not None and self._full(pending.size):
                self._lock.wait()
            if self._ended is not None:
                raise self._ended
            if self._keeper is None:
                return False
            if not self._pending:
                self._retrying.began()
            self._pending[request_id(pending.call.key)] = pending
            if self._stream is not None:
                self._stream.put(pending.frames(), pending.rank)
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
            error = self._unless_renewed(self._read(stream))
            stream.close()
            with self._lock:
                self._stream = None
                self._unchecked += 1
            self._retrying.broke(stream.moved)
            stream = self._revive(error)

    def _unless_renewed(self, error: IsthmusError) -> IsthmusError:
        """A certificate that the server refuses may have a successor in its folder by now."""
        known = self._credentials
        if not isinstance(error, CertificateError) or known is None or known.fresh() == known:
            return error
        return UnreachableError("the certificate was renewed")

    def _read(self, stream: Stream) -> IsthmusError:
        """Handle what arrives; returns why the stream ended."""
        try:
            for frame in stream:
                self._handle(stream, frame)
        except grpc.RpcError as error:
            if self._ended is not None:
                return self._ended
            if stream.silent:
                return UnreachableError(f"{self._address} gave no sign of life")
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
            pending = self._pending.get(request_id(part.key))
        phase: Phase = pending.phase if pending is not None else "control"
        counted = {"down_bytes": stream.latest_bytes, "down_payload_bytes": payload}
        if pending is not None and not isinstance(part, pb.Reply) and at_port(part):
            self._be_asked(stream, pending, part, counted)
            return
        self._ledger.add(phase, at=None, **counted)
        if pending is not None and not isinstance(part, pb.PortCall):
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

    def _be_asked(self, stream: Stream, pending: Pending, part: pb.PortCall | Chunk, counted: dict[str, int]) -> None:
        """Answer a question once it is whole; one that breaks the contract fails its request alone."""
        try:
            question = pending.be_asked(part, self._call_bytes)
        except WireError as error:
            self._ledger.add(pending.phase, at=None, **counted)
            self._finish(pending, error)
            return
        self._ledger.add_at(pending.phase, place_of(question[0]), **counted)
        if question[1].complete:
            pending.asked = None
            with suppress(RuntimeError):  # the link was closed meanwhile
                self._answering.submit(self._reply, stream, pending, *question)

    def _reply(self, stream: Stream, pending: Pending, question: pb.PortCall, assembly: Assembly) -> None:
        """Answer a question on the stream that brought it; on another it is asked again."""
        if pending.answer is None:
            return
        try:
            encoded = pending.answer(question, assembly.tensors())
            headers = [header for header, _ in encoded]
            frame = pb.ClientFrame(port=pb.PortAnswer(key=question.key, turn=question.turn, tensors=headers))
            place = place_of(question)
            self._ledger.add_at(pending.phase, place, round_trips=1)
            parts = itertools.chain[pb.ClientFrame | Chunk](
                (frame,), split(question.key, [data for _, data in encoded])
            )
            stream.put((Outgoing(part, pending.phase, at=place) for part in parts), pending.rank)
        except Exception as error:  # noqa: BLE001 (whoever waits for the request shall see it)
            self._finish(pending, error)

    def _take(self, pending: Pending, answer: pb.Reply | Chunk) -> None:
        """Finish a request once its answer is whole; one that breaks the contract fails its request alone."""
        try:
            received = pending.take(answer, self._call_bytes)
        except IsthmusError as error:
            if not self._later(pending, error):
                self._finish(pending, error)
            return
        if received is not None:
            self._retrying.progressed()
            self._count(pending.phase, received.cost)
            self._finish(pending, received)

    def _later(self, pending: Pending, error: IsthmusError) -> bool:
        """Whether a refused request goes out again: when the server said, or else soon, or on the next stream."""
        if pending.refused_since is None:
            pending.refused_since = self._retrying.now()
        wait_s = self._retrying.delay(error, pending.refused_since)
        if wait_s is None:
            waited_s = self._retrying.now() - pending.refused_since
            if not error.retryable or waited_s > self._retrying.patience_s:
                return False
            wait_s = SOON_S  # this stream may well stay, and no other come
        pending.waits = True
        self._send_in(pending, wait_s)
        return True

    def _send_in(self, pending: Pending, seconds: float) -> None:
        sending = threading.Timer(seconds, self._send_again, (pending,))
        sending.daemon = True
        sending.start()

    def _send_again(self, pending: Pending) -> None:
        with self._lock:
            if self._stream is None or not pending.waits or request_id(pending.call.key) not in self._pending:
                return  # it fails with the link, or goes out on the next stream
            if pending.leaving:  # the rest of what was refused is still in front of it
                self._send_in(pending, SOONEST_S)
                return
            pending.begin_anew()
            self._stream.put(pending.frames(), pending.rank)

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

    def _finish(self, pending: Pending, outcome: Received | Exception) -> None:
        with self._lock:
            self._pending.pop(request_id(pending.call.key), None)
            self._lock.notify_all()
        with suppress(InvalidStateError):  # the link was closed meanwhile, or it has failed before
            if isinstance(outcome, Exception):
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
        while (wait_s := self._retrying.pause(error)) is not None:
            with self._lock:
                self._retrying.wait(self._lock, lambda: self._ended is not None, wait_s)
                if self._ended is not None:
                    return None
            try:
                return self._resume(self._connect())
            except IsthmusError as refused:
                error = refused
        self._fail(self._retrying.given_up(error))
        return None

    def _resume(self, stream: Stream) -> Stream:
        with self._lock:
            if self._ended is not None:
                stream.close()
                raise self._ended
            self._stream = stream
            for pending in self._pending.values():
                pending.begin_anew()
                stream.put(pending.frames(), pending.rank)
        return stream

    def _fail(self, error: IsthmusError) -> None:
        with self._lock:
            self._ended = self._ended or error
            pending, self._pending = list(self._pending.values()), {}
            self._lock.notify_all()
        for request in pending:
            with suppress(InvalidStateError):
                request.future.set_exception(error)

    def _connect(self) -> Stream:
        self._credentials = self._credentials and self._credentials.fresh()
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
