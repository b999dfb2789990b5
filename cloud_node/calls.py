"""What a request asks of the span: whether it may, what it holds meanwhile, and its answer.

Knows requests, their limits and the engine; knows no stream and no order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cloud_node.asks import FLOATS, Line
from cloud_node.engine import ASKED, Answer, Asked, Engine, Place
from cloud_node.policy.guard import Guard
from cloud_node.session import Session
from cloud_node.values import OF_VALUES, check_values, read_values
from isthmus.attached import MOST_VALUES
from isthmus.errors import ForbiddenError, LimitError, WireError
from isthmus.linears import Linear, Site
from isthmus.ports import ASKING, CORE, Port
from isthmus.round_trips import Parked
from isthmus.rows import Rows, unpack_bits
from isthmus.wire.chunks import MAX_TENSORS, Assembly
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import Encoded, pack

Result = tuple[pb.Reply, list[memoryview]]

NAME_CHARACTERS = 64

VALUE_BYTES = 4
"""A value of an answer at most."""

PASSES = (pb.PASS_FORWARD, pb.PASS_BACKWARD, pb.PASS_DECODE, pb.PASS_PARK, *OF_VALUES)

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


class Calls:
    """Judges and carries out the requests of one session."""

    def __init__(self, session: Session, engine: Engine, limits: Limits, guard: Guard) -> None:
        self._session = session
        self._guard = guard
        self._engine = engine
        self._limits = limits
        linears = engine.describe().linears
        self._widest = max((_width(linears, port) for port in session.ports if port.kind in ASKING), default=0)

    def begin(self, call: pb.Call) -> Assembly:
        """Judge a request by its headers; its tensors may then arrive.

        Raises:
            IsthmusError: it may not be, or is too large.
        """
        self._check(call)
        return Assembly(call.tensors, self._limits.call_bytes, max(MAX_TENSORS, MOST_VALUES * len(self._session.ports)))

    def held_by(self, call: pb.Call) -> int:
        """Bytes that a request holds here: its own, or its answer's where taps may make that larger."""
        sent = sum(header.size for header in call.tensors)
        if not call.apart:
            return sent
        widths = self._engine.describe().hidden_size + sum(port.width for port in self._session.ports)
        return max(sent, VALUE_BYTES * call.tensors[0].shape[0] * widths)

    def carry_out(self, call: pb.Call, assembly: Assembly) -> Result:
        """The answer to a request that is complete; blocks while it computes.

        Raises:
            IsthmusError: it cannot be answered.
        """
        tensors = assembly.tensors()
        kind, session, microbatch = call.key.pass_kind, self._session.name, call.key.microbatch
        if kind == pb.PASS_PARK:
            return _reply(call, self._engine.park(session, microbatch, self._parked(call, tensors)), [])
        if kind == pb.PASS_VALUES:
            values = read_values(self._named(call), tensors)
            return _reply(call, self._engine.attach(session, microbatch, values), [])
        if kind == pb.PASS_GRADIENTS:
            answer = self._engine.gradients(session, call.parked, list(call.parts))
            return _reply(call, answer, [pack(gradient, "none") for gradient in answer.gradients])
        asked = self._asked(call)
        if kind == pb.PASS_BACKWARD:
            again = (tensors[1], self._rows(call, tensors[1])) if len(tensors) == 2 else None
            if again is None:
                self._guard.look_back(call)
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
        if self._session.valued:
            return Asked(parked=call.parked, input_gradient=call.input_gradient)
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
        self._guard.look(call, hidden_ND, rows)
        return rows

    def _check(self, call: pb.Call) -> None:
        kind, tensors = call.key.pass_kind, len(call.tensors)
        if self._session.forward_only and (kind == pb.PASS_BACKWARD or call.keep):
            raise ForbiddenError("this session was opened forward-only; no backward exists in it")
        if self._session.tapped and kind == pb.PASS_DECODE:
            raise ForbiddenError("this session was opened with taps, which take whole rows; no decode exists in it")
        if kind in OF_VALUES or self._session.valued:
            check_values(call, self._session)
        elif not self._session.round_trips and (call.ports or call.parked or kind == pb.PASS_PARK):
            raise ForbiddenError("this session was opened without lora ports; open one that names them")
        if call.apart and kind != pb.PASS_FORWARD:
            raise WireError("only a forward is answered row by row")
        if call.apart and (self._session.round_trips or self._session.valued):
            raise WireError("a session with ports of adapters answers no rows apart")
        if kind not in PASSES:
            raise WireError(f"no pass {kind}")
        if kind == pb.PASS_PARK or call.parked:
            self._check_parked(call)
        if kind == pb.PASS_PARK or kind in OF_VALUES:
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

    def _check_parked(self, call: pb.Call) -> None:
        if any(port.kind == CORE for port in self._session.ports):
            raise ForbiddenError("cores are not parked; drop them, or open a session with lora ports")
        if call.key.pass_kind != pb.PASS_PARK:
            return
        if len(call.tensors) > 2 * len(self._session.ports):
            raise WireError(f"{len(call.tensors)} tensors for {len(self._session.ports)} ports; park two for each")
        for header in call.tensors:
            if header.dtype not in FLOATS or len(header.shape) != 2 or min(header.shape) < 1:
                raise WireError("a parked adapter is two matrices of float32, bfloat16 or float16")


def _width(linears: Mapping[Site, Linear], port: Port) -> int:
    """Values a token that one question at a port holds at most: its input, and what its group adds."""
    linear = linears[port.block, port.module]
    if port.kind == CORE:
        return port.rank * len(linear.shared)
    return linear.inputs + sum(linears[port.block, other].outputs for other in linear.shared)


def known(key: pb.Key) -> pb.Key:
    """A key without the unknown fields that a peer may have put into it."""
    return pb.Key(microbatch=key.microbatch, pass_kind=key.pass_kind)


def _reply(call: pb.Call, answer: Answer, encoded: list[Encoded]) -> Result:
    headers, payloads = [header for header, _ in encoded], [payload for _, payload in encoded]
    cost = pb.Cost(**vars(answer.work))
    return pb.Reply(key=known(call.key), tensors=headers, kept=answer.kept, cost=cost), payloads
