"""One stream of one session: frames in, answers out, several requests at once.

Knows frames, requests and their limits; the engine computes, the registry authorises. An error of one request is
an answer; only a broken contract ends the stream.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from cloud_node.asks import FLOATS, PORT_OF, Answers, Ask, Line
from cloud_node.engine import ASKED, Answer, Asked, Engine, Place
from cloud_node.round_trips import Parked
from cloud_node.session import RequestId, Session, request_id
from isthmus import __version__
from isthmus.errors import DrainingError, ForbiddenError, IsthmusError, LimitError, WireError
from isthmus.ledger.memory import peak_bytes
from isthmus.linears import Linear, Site
from isthmus.ports import LORA, Port
from isthmus.rows import Rows, unpack_bits
from isthmus.wire.chunks import MAX_TENSORS, Assembly, Outbox, split
from isthmus.wire.frames import Chunk, sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.status import failure
from isthmus.wire.tensors import Encoded, pack

Result = tuple[pb.Reply, list[memoryview]]

REFUSALS = 1 << 12
"""Refused requests that a stream bears before it ends; chunks of a refused request are ignored by its id."""

NAME_CHARACTERS = 64

VALUE_BYTES = 4
"""A value of an answer at most."""

PASSES = (pb.PASS_FORWARD, pb.PASS_BACKWARD, pb.PASS_DECODE, pb.PASS_PARK)

ROWS_APART = 1 << 13
"""Rows that one request may ask for apart: each has headers of its own in one message."""


@dataclass(frozen=True)
class Limits:
    """What one session may ask at once; the model card names them."""

    call_tokens: int = 1 << 17
    row_tokens: int = 1 << 15
    call_bytes: int = 1 << 28
    calls_in_flight: int = 64

    def to_wire(self) -> pb.Limits:
        """The message that says the same."""
        return pb.Limits(
            call_tokens=self.call_tokens,
            row_tokens=self.row_tokens,
            call_bytes=self.call_bytes,
            calls_in_flight=self.calls_in_flight,
        )


class SessionStream:
    """Serves one stream until the client ends it, breaks the contract, or the node drains."""

    def __init__(self, session: Session, engine: Engine, limits: Limits, pool: Executor) -> None:
        self._session = session
        self._engine = engine
        self._limits = limits
        self._pool = session.pool or pool
        self._outbox: Outbox[pb.ServerFrame | Chunk] = Outbox()
        self._wake = asyncio.Event()
        self._left = asyncio.Event()
        self._arriving: dict[RequestId, tuple[pb.Call, Assembly]] = {}
        self._declared: dict[int, int] = {}  # bytes of requests whose answers have not left, by the call's identity
        linears = engine.describe().linears
        self._widest = max((_width(linears, port) for port in session.ports if port.kind == LORA), default=0)
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

        session.asks.send = send

    def drain(self) -> None:
        """Tell the client that the node is going, answer what is under way, then end the stream."""
        self._put_first(pb.ServerFrame(drain=pb.Drain(reason="the server is shutting down")))
        self._end()

    def replaced(self) -> None:
        """End the stream because the same session was opened again on another."""
        self._closing = True
        self._put_first(pb.ServerFrame(failure=failure(DrainingError("the session was opened on another stream"))))

    def count_received(self, frame: pb.ClientFrame | Chunk) -> None:
        """Count a frame that the caller read for this stream."""
        self._received += sent_bytes(frame)

    async def read(self, frames: AsyncIterator[pb.ClientFrame | Chunk]) -> None:
        """Handle the client's frames until it stops sending."""
        try:
            async for frame in frames:
                self.count_received(frame)
                self._handle(frame)
                await self._room()
            self.closed_by_client = True
        except WireError as error:
            self._put_first(pb.ServerFrame(failure=failure(error)))
        except DecodeError:
            self._put_first(pb.ServerFrame(failure=failure(WireError("what was sent is no frame of this protocol"))))
        finally:
            self._end()

    async def write(self) -> AsyncIterator[pb.ServerFrame | Chunk]:
        """The frames to send, until everything is answered and the stream is closing."""
        self._put_first(pb.ServerFrame(opened=pb.Opened(server_version=__version__)))
        while True:
            frame = self._outbox.next()
            if frame is not None:
                self._sent += sent_bytes(frame)
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
            self._check(call)
            declared = self._held_by(call)
            if self._declared and sum(self._declared.values()) + declared > self._limits.call_bytes:
                raise LimitError(f"more than {self._limits.call_bytes} bytes are unanswered; wait for some")
            most = max(MAX_TENSORS, 2 * len(self._session.ports))
            self._arriving[request] = (call, Assembly(call.tensors, self._limits.call_bytes, most))
            self._declared[id(call)] = declared
            self._refused.discard(request)
        except IsthmusError as error:
            self._refuse(call, error)
            return
        self._finish_if_complete(request)

    def _held_by(self, call: pb.Call) -> int:
        """Bytes that a request holds here: its own, or its answer's where taps may make that larger."""
        sent = sum(header.size for header in call.tensors)
        if not call.apart:
            return sent
        widths = self._engine.describe().hidden_size + sum(port.width for port in self._session.ports)
        return max(sent, VALUE_BYTES * call.tensors[0].shape[0] * widths)

    def _check(self, call: pb.Call) -> None:
        kind, tensors = call.key.pass_kind, len(call.tensors)
        if self._session.forward_only and (kind == pb.PASS_BACKWARD or call.keep):
            raise ForbiddenError("this session was opened forward-only; no backward exists in it")
        if self._session.ports and not self._session.round_trips and kind == pb.PASS_DECODE:
            raise ForbiddenError("this session was opened with taps, which take whole rows; no decode exists in it")
        if not self._session.round_trips and (call.ports or call.parked or kind == pb.PASS_PARK):
            raise ForbiddenError("this session was opened without lora ports; open one that names them")
        if call.apart and kind != pb.PASS_FORWARD:
            raise WireError("only a forward is answered row by row")
        if call.apart and self._session.round_trips:
            raise WireError("a session with lora ports answers no rows apart")
        if kind not in PASSES:
            raise WireError(f"no pass {kind}")
        if kind == pb.PASS_PARK:
            self._check_parked(call)
            return
        if not (tensors == 1 or (kind == pb.PASS_BACKWARD and tensors == 2)):
            raise WireError(f"{tensors} tensors where a forward or decode has one and a backward one or two")
        if len(call.sequence.id) > NAME_CHARACTERS:
            raise WireError(f"a sequence's id has at most {NAME_CHARACTERS} characters")
        size = self._engine.describe().hidden_size
        for header in call.tensors:
            if header.dtype not in FLOATS:
                raise WireError(f"hidden states of dtype {header.dtype!r:.20}; send float32, bfloat16 or float16")
            if len(header.shape) != 2 or header.shape[1] != size:
                raise WireError(f"shape {list(header.shape)[:8]} is not (tokens, {size})")
            if header.shape[0] > self._limits.call_tokens:
                raise LimitError(f"{header.shape[0]} tokens; a request has at most {self._limits.call_tokens}")

    def _ask(self, ask: Ask) -> None:
        """Put a question to the edge; a pass that outlived its stream comes here on the next."""
        self._outbox.put(ask.frames())
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

    def _check_parked(self, call: pb.Call) -> None:
        if len(call.tensors) > 2 * len(self._session.ports):
            raise WireError(f"{len(call.tensors)} tensors for {len(self._session.ports)} ports; park two for each")
        for header in call.tensors:
            if header.dtype not in FLOATS or len(header.shape) != 2 or min(header.shape) < 1:
                raise WireError("a parked adapter is two matrices of float32, bfloat16 or float16")

    def _finish_if_complete(self, request: RequestId) -> None:
        call, assembly = self._arriving[request]
        if assembly.complete:
            del self._arriving[request]
            task = asyncio.get_running_loop().create_task(self._answer(call, assembly))
            self._answering.add(task)
            task.add_done_callback(self._answered)

    async def _answer(self, call: pb.Call, assembly: Assembly) -> None:
        request = request_id(call.key)
        try:
            self._session.admit(call)
            running = self._session.running.get(request)
            if running is not None and (ask := self._open_ask(call)) is not None:
                self._ask(ask)  # the stream that carried it may be gone
            if running is None:
                running = asyncio.get_running_loop().create_task(self._compute(call, assembly))
                self._session.running[request] = running
                running.add_done_callback(lambda _: self._session.running.pop(request, None))
            reply, payloads = await asyncio.shield(running)
        except IsthmusError as error:
            self._refuse(call, error)
            return
        self._outbox.put(self._leaving(call, reply, payloads))
        self._wake.set()

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
        return await loop.run_in_executor(self._pool, self._compute_now, call, assembly)

    def _compute_now(self, call: pb.Call, assembly: Assembly) -> Result:
        tensors = assembly.tensors()
        kind, session, microbatch = call.key.pass_kind, self._session.name, call.key.microbatch
        if kind == pb.PASS_PARK:
            return _reply(call, self._engine.park(session, microbatch, self._parked(call, tensors)), [])
        asked = self._asked(call)
        if kind == pb.PASS_BACKWARD:
            again = (tensors[1], self._rows(call, tensors[1])) if len(tensors) == 2 else None
            answer = self._engine.backward(session, microbatch, tensors[0], again, asked)
            return _reply(call, answer, [pack(answer.tensor_KD, self._session.codec_gradient)])
        rows = self._rows(call, tensors[0])
        if kind == pb.PASS_FORWARD:
            answer = self._engine.forward(session, microbatch, tensors[0], rows, call.keep, asked)
        else:
            place = Place(call.sequence.id, call.sequence.start, call.sequence.after)
            answer = self._engine.decode(session, microbatch, tensors[0], rows, place, asked)
        return _reply(call, answer, self._encoded(answer, rows, call.apart))

    def _encoded(self, answer: Answer, rows: Rows, apart: bool) -> list[Encoded]:
        """An answer's tensors as they cross: output and taps, whole or row by row."""
        lengths, returned = rows.apart() if apart else ([rows.tokens], [rows.returned])
        columns = [[pack(part, self._session.codec_activation) for part in torch.split(answer.tensor_KD, returned)]]
        if answer.taps_NW is not None:
            columns.append([pack(part, self._session.codec_port) for part in torch.split(answer.taps_NW, lengths)])
        return [encoded for row in zip(*columns, strict=True) for encoded in row]

    def _asked(self, call: pb.Call) -> Asked:
        """What a request asks at the session's ports."""
        if not self._session.round_trips:
            return ASKED
        sites = frozenset((port.block, port.module) for port in self._named(call))
        line = Line(call.key, self._session.asks, self._session.codec_port)
        return Asked(sites, line, call.parked, call.input_gradient)

    def _named(self, call: pb.Call) -> list[Port]:
        """The ports that a request names; all where it names none.

        Raises:
            WireError: its bitmap does not fit the session's ports.
        """
        ports = self._session.ports
        named = unpack_bits(call.ports, len(ports)).tolist() if call.ports else [True] * len(ports)
        return [port for port, here in zip(ports, named, strict=True) if here]

    def _parked(self, call: pb.Call, tensors: list[torch.Tensor]) -> dict[Site, Parked]:
        named = self._named(call)
        if len(tensors) != 2 * len(named):
            raise WireError(f"{len(tensors)} tensors do not make adapters of {len(named)} ports, two each")
        pairs = zip(named, tensors[::2], tensors[1::2], strict=True)
        return {(port.block, port.module): Parked(down_RI, up_OR) for port, down_RI, up_OR in pairs}

    def _rows(self, call: pb.Call, hidden_ND: torch.Tensor) -> Rows:
        rows = Rows.from_wire(call.rows)
        if rows.tokens != len(hidden_ND):
            raise WireError(f"rows of {rows.tokens} tokens do not describe {len(hidden_ND)} hidden states")
        reach = max(*rows.starts, call.sequence.start) + rows.longest
        if reach > self._limits.row_tokens:
            raise LimitError(f"a row reaches position {reach}; {self._limits.row_tokens} is the limit")
        positions = len(rows.lengths) * rows.longest
        if positions > 4 * self._limits.call_tokens:
            raise LimitError("the rows' lengths differ so much that padding them is too costly; send similar lengths")
        if call.apart and len(rows.lengths) > ROWS_APART:
            raise LimitError(f"{len(rows.lengths)} rows answered apart; {ROWS_APART} are the limit")
        tapped = 4 * positions * sum(port.width for port in self._session.ports)
        if tapped > self._limits.call_bytes:
            raise LimitError(f"taps of {tapped} bytes; {self._limits.call_bytes} are the limit: send fewer rows")
        asked = VALUE_BYTES * len(hidden_ND) * self._widest
        if asked > self._limits.call_bytes:
            raise LimitError(f"{asked} bytes at one port; {self._limits.call_bytes} are the limit: send fewer rows")
        return rows

    def _refuse(self, call: pb.Call, error: IsthmusError) -> None:
        if len(self._refused) >= REFUSALS:
            raise WireError(f"{REFUSALS} requests were refused; mend the client")
        self._refused.add(request_id(call.key))
        self._declared.pop(id(call), None)
        self._put_first(pb.ServerFrame(reply=pb.Reply(key=_known(call.key), failure=failure(error))))

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._put_first(pb.ServerFrame(failure=failure(IsthmusError("the server failed; its log says why"))))
            self._closing = True
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a request failed unexpectedly", "exception": task.exception()}
            )
        if self._ending:
            self._end()

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
            peak_tensor_bytes=self._engine.peak_tensor_bytes(),
            peak_memory_bytes=peak_bytes() or 0,
        )


def _width(linears: Mapping[Site, Linear], port: Port) -> int:
    """Values a token that one question at a port holds at most: its input, and what its group adds."""
    linear = linears[port.block, port.module]
    return linear.inputs + sum(linears[port.block, other].outputs for other in linear.shared)


def _known(key: pb.Key) -> pb.Key:
    """A key without the unknown fields that a peer may have put into it."""
    return pb.Key(microbatch=key.microbatch, pass_kind=key.pass_kind)


def _reply(call: pb.Call, answer: Answer, encoded: list[Encoded]) -> Result:
    headers, payloads = [header for header, _ in encoded], [payload for _, payload in encoded]
    cost = pb.Cost(**vars(answer.work))
    return pb.Reply(key=_known(call.key), tensors=headers, kept=answer.kept, cost=cost), payloads
