"""One stream of one session: frames in, answers out, several requests at once.

Knows frames, requests and their limits; the engine computes, the registry authorises. An error of one request is
an answer; only a broken contract ends the stream.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor

from google.protobuf.message import DecodeError

from cloud_node.asks import PORT_OF, Answers, Ask
from cloud_node.calls import Calls, Limits, known
from cloud_node.computing import Computing
from cloud_node.engine import Engine
from cloud_node.outgoing import Outgoing, tally_of
from cloud_node.policy.authority import Authority
from cloud_node.policy.guard import Guard
from cloud_node.session import RequestId, Session, request_id
from cloud_node.unanswered import Unanswered
from cloud_node.watch import Watch
from isthmus import __version__
from isthmus.errors import DrainingError, IsthmusError, LimitError, WireError
from isthmus.faults import Fault, passing
from isthmus.wire.chunks import Assembly, split
from isthmus.wire.frames import Chunk, sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.status import failure

REFUSALS = 1 << 12
"""Refused requests that a stream bears before it ends; chunks of a refused request are ignored by its id."""

UNEXPECTED = IsthmusError("the server failed; its log says why")

LOST_WITHIN_S = 0.1
"""A lost line looks like an orderly end until its call is cancelled, which comes at once."""


class SessionStream:
    """Serves one stream until the client ends it, breaks the contract, or the node drains."""

    def __init__(
        self,
        session: Session,
        engine: Engine,
        limits: Limits,
        pool: Executor,
        watch: Watch | None = None,
        authority: Authority | None = None,
    ) -> None:
        self._session = session
        self._watch = (watch or Watch()).of(session)
        self._watch.streams += 1
        self._engine = engine
        self._limits = limits
        self._outgoing = Outgoing(self._watch, limits.calls_in_flight)
        self._arriving: dict[RequestId, tuple[pb.Call, Assembly]] = {}
        self._guard = Guard(authority or Authority(), session)
        self._unanswered = Unanswered(self._guard, limits.call_bytes)
        self._calls = Calls(session, engine, limits, self._guard)
        self._computing = Computing(session, self._calls, pool, self._watch)
        self._answers = Answers(session.asks, limits.call_bytes)
        self._refused: set[RequestId] = set()
        self._answering: set[asyncio.Task[None]] = set()
        self._ending = False  # no new requests; the stream closes once all are answered
        self._received = 0
        self.serial: int | None = None  # of the certificate that its client showed
        self.closed_by_client = False  # in good order, so nothing needs to wait for it
        loop = asyncio.get_running_loop()

        def send(ask: Ask) -> None:
            loop.call_soon_threadsafe(self._ask, ask)

        self._send = send
        session.asks.resume(send)

    def drain(self) -> None:
        """Tell the client that the node is going, answer what is under way, then end the stream."""
        self._outgoing.put_first(pb.ServerFrame(drain=pb.Drain(reason="the server is shutting down")))
        self._end()

    def end(self, error: IsthmusError) -> None:
        """End the stream because its client may no longer be here."""
        self._watch.broken(error)
        self._outgoing.close()
        self._say_why(error)

    def count_received(self, frame: pb.ClientFrame | Chunk) -> None:
        """Count a frame that the caller read for this stream."""
        size = sent_bytes(frame)
        self._received += size
        self._watch.received(size)

    async def read(self, frames: AsyncIterator[pb.ClientFrame | Chunk]) -> None:
        """Handle the client's frames until it stops sending."""
        try:
            async for frame in frames:
                self.count_received(frame)
                self._handle(frame)
                await self._outgoing.room()
            self.closed_by_client = True
        except DecodeError:
            self._break(WireError("what was sent is no frame of this protocol"))
        except Exception as error:  # noqa: BLE001 (nobody awaits the reading; the log and the client shall hear of it)
            self._break(error)
        finally:
            self._end()
        await asyncio.sleep(LOST_WITHIN_S)  # on a lost line this is cancelled: a question waits for the next stream
        stopped = "the client stopped sending while a pass waited at a port; send the request again"
        self._session.asks.pause(self._send, DrainingError(stopped))

    def write(self) -> AsyncIterator[pb.ServerFrame | Chunk]:
        """The frames to send, until everything is answered and the stream is closing."""
        self._outgoing.put_first(pb.ServerFrame(opened=pb.Opened(server_version=__version__)))
        return self._outgoing.frames()

    def cancel(self) -> None:
        """Stop answering on this stream; work under way finishes for whoever asks again."""
        self._watch.streams -= 1
        self._guard.close()
        for task in self._answering:
            task.cancel()

    def _handle(self, frame: pb.ClientFrame | Chunk) -> None:
        if isinstance(frame, Chunk):
            self._continue(frame)
            return
        match frame.WhichOneof("body"):
            case "call":
                self._begin(frame.call)
            case "port":
                self._answers.begin(frame.port)
            case "release":
                microbatches = [key.microbatch for key in frame.release.keys]
                self._engine.release(self._session.name, microbatches, list(frame.release.sequences))
            case "heartbeat":
                self._outgoing.put_first(pb.ServerFrame(heartbeat=pb.Heartbeat(nonce=frame.heartbeat.nonce)))
            case "tally":
                tally = tally_of(self._received, self._outgoing.sent, self._engine.load())
                self._outgoing.put_first(pb.ServerFrame(tally=tally))
            case other:
                raise WireError(f"a frame with {other or 'nothing'} does not belong inside a session")

    def _begin(self, call: pb.Call) -> None:
        request = request_id(call.key)
        try:
            if self._ending:
                raise DrainingError("the server is shutting down; send the request again when it is back")
            if request in self._arriving:
                raise WireError(f"microbatch {request[0]} begins twice")
            if len(self._arriving) + len(self._answering) >= self._limits.calls_in_flight:
                raise LimitError(f"more than {self._limits.calls_in_flight} requests are unanswered; wait for some")
            assembly = self._calls.begin(call)
            self._unanswered.begin(call, self._calls.held_by(call))
            self._arriving[request] = (call, assembly)
            self._refused.discard(request)
        except IsthmusError as error:
            self._refuse(call, error)
            return
        self._finish_if_complete(request)

    def _ask(self, ask: Ask) -> None:
        """Put a question to the edge, once on a stream; a pass that outlived its stream comes here on the next."""
        if ask.carrier is self:
            return
        ask.carrier = self
        self._outgoing.put(ask.frames(), ask.header.key.microbatch)  # the older first; see edge_client.pending

    def _continue(self, chunk: Chunk) -> None:
        request = request_id(chunk.key)
        if chunk.key.pass_kind in PORT_OF.values():
            self._answers.add(chunk)
            return
        if request in self._refused:
            return  # its sender has not read the refusal yet
        if request not in self._arriving:
            raise WireError(f"a chunk of microbatch {request[0]}, which was not begun")
        try:
            self._arriving[request][1].add(chunk)
        except WireError as error:
            call, _ = self._arriving.pop(request)
            self._refuse(call, error)
            return
        self._finish_if_complete(request)

    def _finish_if_complete(self, request: RequestId) -> None:
        call, assembly = self._arriving[request]
        if assembly.complete:
            del self._arriving[request]
            task = asyncio.get_running_loop().create_task(self._answer(call, assembly))
            self._answering.add(task)
            task.add_done_callback(lambda done: self._answered(call, done))

    async def _answer(self, call: pb.Call, assembly: Assembly) -> None:
        request, began = request_id(call.key), time.monotonic()
        try:
            self._session.admit(call)
            self._guard.charge(call)
            if request in self._session.running and (ask := self._open_ask(call)) is not None:
                self._ask(ask)  # the stream that carried it may be gone
            reply, payloads = await self._computing.result(call, assembly)
        except IsthmusError as error:
            self._refuse(call, error)
            return
        self._watch.answered(call, time.monotonic() - began)
        rank = call.key.microbatch if self._session.round_trips else 0
        self._outgoing.put(self._leaving(call, reply, payloads), rank)

    def _open_ask(self, call: pb.Call) -> Ask | None:
        port = PORT_OF.get(call.key.pass_kind)
        return self._session.asks.find((call.key.microbatch, port)) if port is not None else None

    def _leaving(self, call: pb.Call, reply: pb.Reply, payloads: list[memoryview]) -> Iterator[pb.ServerFrame | Chunk]:
        """An answer's frames; until the last has left, its request counts as unanswered."""
        yield pb.ServerFrame(reply=reply)
        yield from split(reply.key, payloads)
        passing(Fault.SERVER_AFTER_REPLY)
        self._unanswered.done(call, sum(payload.nbytes for payload in payloads))

    def _refuse(self, call: pb.Call, error: IsthmusError) -> None:
        if len(self._refused) >= REFUSALS:
            raise WireError(f"{REFUSALS} requests were refused; mend the client")
        self._refused.add(request_id(call.key))
        self._watch.refused(call, error)
        self._unanswered.done(call)
        self._outgoing.put_first(pb.ServerFrame(reply=pb.Reply(key=known(call.key), failure=failure(error))))

    def _break(self, error: BaseException, call: pb.Call | None = None) -> None:
        """Say why the stream ends; an error that is not of the catalogue stays here, in the log."""
        self._watch.broken(error, call)
        self._say_why(error if isinstance(error, IsthmusError) else UNEXPECTED)

    def _answered(self, call: pb.Call, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._break(error, call)
            self._outgoing.close()
        if self._ending:
            self._end()

    def _say_why(self, error: IsthmusError) -> None:
        self._outgoing.put_first(pb.ServerFrame(failure=failure(error)))

    def _end(self) -> None:
        self._ending = True
        if not self._answering:
            self._outgoing.close()
