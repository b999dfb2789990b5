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
from cloud_node.calls import Calls, Limits, Result, known
from cloud_node.engine import Engine
from cloud_node.session import RequestId, Session, request_id
from cloud_node.watch import Watch
from isthmus import __version__
from isthmus.errors import DrainingError, IsthmusError, LimitError, WireError
from isthmus.ledger.memory import peak_bytes
from isthmus.wire.chunks import Assembly, Outbox, split
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
        self, session: Session, engine: Engine, limits: Limits, pool: Executor, watch: Watch | None = None
    ) -> None:
        self._session = session
        self._watch = (watch or Watch()).of(session)
        self._watch.streams += 1
        self._engine = engine
        self._limits = limits
        self._pool = session.pool or pool
        self._outbox: Outbox[pb.ServerFrame | Chunk] = Outbox()
        self._wake = asyncio.Event()
        self._left = asyncio.Event()
        self._arriving: dict[RequestId, tuple[pb.Call, Assembly]] = {}
        self._declared: dict[int, int] = {}  # bytes of requests whose answers have not left, by the call's identity
        self._calls = Calls(session, engine, limits)
        self._answers = Answers(session.asks, limits.call_bytes)
        self._refused: set[RequestId] = set()
        self._answering: set[asyncio.Task[None]] = set()
        self._ending = False  # no new requests; the stream closes once all are answered
        self._closing = False  # the stream closes once everything queued is sent
        self._received = 0
        self._sent = 0
        self.closed_by_client = False  # in good order, so nothing needs to wait for it
        loop = asyncio.get_running_loop()

        def send(ask: Ask) -> None:
            loop.call_soon_threadsafe(self._ask, ask)

        self._send = send
        session.asks.resume(send)

    def drain(self) -> None:
        """Tell the client that the node is going, answer what is under way, then end the stream."""
        self._put_first(pb.ServerFrame(drain=pb.Drain(reason="the server is shutting down")))
        self._end()

    def replaced(self) -> None:
        """End the stream because the same session was opened again on another."""
        self._closing = True
        self._say_why(DrainingError("the session was opened on another stream"))

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
                await self._room()
            self.closed_by_client = True
        except WireError as error:
            self._break(error)
        except DecodeError:
            self._break(WireError("what was sent is no frame of this protocol"))
        except Exception as error:  # noqa: BLE001 (nobody awaits the reading; the log and the client shall hear of it)
            self._break(error)
        finally:
            self._end()
        await asyncio.sleep(LOST_WITHIN_S)  # on a lost line this is cancelled: a question waits for the next stream
        stopped = "the client stopped sending while a pass waited at a port; send the request again"
        self._session.asks.pause(self._send, DrainingError(stopped))

    async def write(self) -> AsyncIterator[pb.ServerFrame | Chunk]:
        """The frames to send, until everything is answered and the stream is closing."""
        self._put_first(pb.ServerFrame(opened=pb.Opened(server_version=__version__)))
        while True:
            frame = self._outbox.next()
            if frame is not None:
                size = sent_bytes(frame)
                self._sent += size
                self._watch.sent(size)
                self._left.set()
                yield frame
            elif self._closing:
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _room(self) -> None:
        """Wait while more waits to be sent than a client that reads would leave: one that does not is not read."""
        while len(self._outbox) > self._limits.calls_in_flight and not self._closing:
            self._left.clear()
            await self._left.wait()

    def cancel(self) -> None:
        """Stop answering on this stream; work under way finishes for whoever asks again."""
        self._watch.streams -= 1
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
                self._put_first(pb.ServerFrame(heartbeat=pb.Heartbeat(nonce=frame.heartbeat.nonce)))
            case "tally":
                self._put_first(pb.ServerFrame(tally=self._tally()))
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
            declared = self._calls.held_by(call)
            if self._declared and sum(self._declared.values()) + declared > self._limits.call_bytes:
                raise LimitError(f"more than {self._limits.call_bytes} bytes are unanswered; wait for some")
            self._arriving[request] = (call, assembly)
            self._declared[id(call)] = declared
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
        self._outbox.put(ask.frames(), ask.header.key.microbatch)  # the older first; see edge_client.pending
        self._wake.set()

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
            running = self._session.running.get(request)
            if running is not None and (ask := self._open_ask(call)) is not None:
                self._ask(ask)  # the stream that carried it may be gone
            if running is None:
                running = asyncio.get_running_loop().create_task(self._compute(call, assembly))
                self._session.running[request] = running
                running.add_done_callback(lambda done: self._computed(request, done))
            reply, payloads = await asyncio.shield(running)
        except IsthmusError as error:
            self._refuse(call, error)
            return
        self._watch.answered(call.key, time.monotonic() - began)
        rank = call.key.microbatch if self._session.round_trips else 0
        self._outbox.put(self._leaving(call, reply, payloads), rank)
        self._wake.set()

    def _computed(self, request: RequestId, done: "asyncio.Task[Result]") -> None:
        """Forget a request that has run; where its client is gone nobody else looks at how it ended."""
        self._session.running.pop(request, None)
        if not done.cancelled():
            done.exception()

    def _open_ask(self, call: pb.Call) -> Ask | None:
        port = PORT_OF.get(call.key.pass_kind)
        return self._session.asks.find((call.key.microbatch, port)) if port is not None else None

    def _leaving(self, call: pb.Call, reply: pb.Reply, payloads: list[memoryview]) -> Iterator[pb.ServerFrame | Chunk]:
        """An answer's frames; until the last has left, its request counts as unanswered."""
        yield pb.ServerFrame(reply=reply)
        yield from split(reply.key, payloads)
        self._declared.pop(id(call), None)

    async def _compute(self, call: pb.Call, assembly: Assembly) -> Result:
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self._pool, self._calls.carry_out, call, assembly)
        self._watch.computed(call.key, result[0].cost)
        return result

    def _refuse(self, call: pb.Call, error: IsthmusError) -> None:
        if len(self._refused) >= REFUSALS:
            raise WireError(f"{REFUSALS} requests were refused; mend the client")
        self._refused.add(request_id(call.key))
        self._watch.refused(call.key, error)
        self._declared.pop(id(call), None)
        self._put_first(pb.ServerFrame(reply=pb.Reply(key=known(call.key), failure=failure(error))))

    def _break(self, error: BaseException, key: pb.Key | None = None) -> None:
        """Say why the stream ends; an error that is not of the catalogue stays here, in the log."""
        self._watch.broken(error, key)
        self._say_why(error if isinstance(error, IsthmusError) else UNEXPECTED)

    def _answered(self, call: pb.Call, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._break(error, call.key)
            self._closing = True
        if self._ending:
            self._end()

    def _say_why(self, error: IsthmusError) -> None:
        self._put_first(pb.ServerFrame(failure=failure(error)))

    def _end(self) -> None:
        self._ending = True
        self._closing = self._closing or not self._answering
        self._wake.set()

    def _put_first(self, frame: pb.ServerFrame) -> None:
        self._outbox.put_first(frame)
        self._wake.set()

    def _tally(self) -> pb.Tally:
        return pb.Tally(
            received_bytes=self._received,
            sent_bytes=self._sent,
            peak_tensor_bytes=self._engine.load().peak_bytes,
            peak_memory_bytes=peak_bytes() or 0,
        )
