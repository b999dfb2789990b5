"""What one microbatch moves over the wire: its passes, what they ask at ports, and what is left with the cloud.

Knows what a session agreed on, rows, and who takes part; knows no model and no schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isthmus.planning.figures import Crossing
from isthmus.planning.questions import PortQuestion
from isthmus.planning.wire import asked, asked_at_ports, hollow
from isthmus.rows import Rows
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import Encoded

NUMBER = 1 << 10
"""Of the microbatch and the step of every message: about as long as those of most of a run's."""


@dataclass(frozen=True)
class Agreed:
    """What both sides of a session compute in, and what of it crosses.

    Attributes:
        hidden_size: of the model.
        edge_dtype, span_dtype: what either side computes in, hence sends.
        activation, gradient, port: the codecs.
        keeps: a backward follows each forward.
        below: the gradient of the span's input comes back.
        taps: values a token of all taps together.
        answers_ports: the session has ports of adapters, be it that the edge answers or that their values come.
    """

    hidden_size: int
    edge_dtype: torch.dtype
    span_dtype: torch.dtype
    activation: str
    gradient: str
    port: str
    keeps: bool
    below: bool
    taps: int = 0
    answers_ports: bool = False


@dataclass(frozen=True)
class Part:
    """Who takes part in a request of a session whose ports answer.

    Attributes:
        bitmap: of the ports, as requests name them.
        parked: adapters left with the cloud are added too.
    """

    bitmap: bytes = b""
    parked: bool = False


def forward_pass(agreed: Agreed, rows: Rows, part: Part, said: pb.Cost) -> Crossing:
    """A forward, without what it asks at ports.

    Args:
        agreed: by the session.
        rows: the microbatch's.
        part: who takes part.
        said: of its cost, by the cloud.
    """
    call = _call(agreed, pb.PASS_FORWARD, part)
    call.rows.CopyFrom(rows.to_wire())
    call.keep = agreed.keeps
    into = hollow(agreed.edge_dtype, (rows.tokens, agreed.hidden_size), agreed.activation)
    out = hollow(agreed.span_dtype, (rows.returned, agreed.hidden_size), agreed.activation)
    return asked(call, [into], [out], said, agreed.keeps)


def backward_pass(agreed: Agreed, rows: Rows, part: Part, said: pb.Cost) -> Crossing:
    """The backward of such a forward."""
    due = rows.tokens if agreed.below else 0
    gradient = hollow(agreed.edge_dtype, (rows.returned, agreed.hidden_size), agreed.gradient)
    answer = hollow(agreed.span_dtype, (due, agreed.hidden_size), agreed.gradient)
    return asked(_call(agreed, pb.PASS_BACKWARD, part), [gradient], [answer], said, kept=False)


def apart(agreed: Agreed, rows: Rows, forward: pb.Cost) -> Crossing:
    """A forward that no backward follows, answered row by row, for the edge to keep."""
    key = pb.Key(microbatch=NUMBER, pass_kind=pb.PASS_FORWARD)
    call = pb.Call(key=key, rows=rows.to_wire(), apart=True)
    into = hollow(agreed.edge_dtype, (rows.tokens, agreed.hidden_size), agreed.activation)
    answer: list[Encoded] = []
    for length, returned in zip(*rows.apart(), strict=True):
        answer.append(hollow(agreed.span_dtype, (returned, agreed.hidden_size), agreed.activation))
        if agreed.taps:
            answer.append(hollow(agreed.span_dtype, (length, agreed.taps), agreed.port))
    return asked(call, [into], answer, forward, kept=False)


def at_port(agreed: Agreed, tokens: int, question: PortQuestion) -> Crossing:
    """One question at ports and its answer, for so many real tokens."""
    kind = pb.PASS_BACKWARD_PORT if question.backward else pb.PASS_FORWARD_PORT
    message = pb.PortCall(
        key=pb.Key(microbatch=NUMBER, pass_kind=kind),
        turn=1,
        block=question.block,
        modules=question.modules,
        backward=question.backward,
        wanted=question.wanted,
    )
    sent, due = (
        [hollow(agreed.span_dtype, (tokens, width), agreed.port) for width in widths]
        for widths in (question.sent, question.due)
    )
    return asked_at_ports(message, sent, due)


def parked(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, bitmap: bytes) -> Crossing:
    """Leaving adapters with the cloud: matrices of these shapes, of the ports in the bitmap."""
    key = pb.Key(microbatch=NUMBER, pass_kind=pb.PASS_PARK)
    matrices = [hollow(dtype, shape, "none") for shape in shapes]
    return asked(pb.Call(key=key, ports=bitmap), matrices, [], pb.Cost(), kept=False)


def values(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, bitmap: bytes, parts: int) -> Crossing:
    """Values of these shapes for a step, of the ports in the bitmap; and their gradients, over so many backwards."""
    tensors = [hollow(dtype, shape, "none") for shape in shapes]
    key, fetched = (pb.Key(microbatch=NUMBER, pass_kind=kind) for kind in (pb.PASS_VALUES, pb.PASS_GRADIENTS))
    there = asked(pb.Call(key=key, ports=bitmap, step=NUMBER), tensors, [], pb.Cost(), kept=False)
    call = pb.Call(key=fetched, parts=[NUMBER] * parts, parked=NUMBER, step=NUMBER)
    return there + asked(call, [], tensors, pb.Cost(), kept=False)


def _call(agreed: Agreed, kind: "pb.Pass", part: Part) -> pb.Call:
    call = pb.Call(key=pb.Key(microbatch=NUMBER, pass_kind=kind), step=NUMBER)
    if agreed.answers_ports:
        call.ports, call.input_gradient = part.bitmap, agreed.below
        call.parked = NUMBER if part.parked else 0
    return call
