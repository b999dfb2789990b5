"""Requests about an adapter's values: whether they may be, and what they bring.

Knows requests, ports and how many tensors each kind has; computes nothing, and gives nothing that came to `peft`.
"""

from collections.abc import Sequence

import torch

from cloud_node.asks import FLOATS
from cloud_node.session import Session
from isthmus.attached import TENSORS, Values
from isthmus.errors import ForbiddenError, LimitError, WireError
from isthmus.linears import Site
from isthmus.ports import Port
from isthmus.wire.gen import backbone_pb2 as pb

OF_VALUES = (pb.PASS_VALUES, pb.PASS_GRADIENTS)

MOST_PARTS = 1 << 12
"""Backwards of a step whose gradients are summed."""


def check_values(call: pb.Call, session: Session) -> None:
    """Judge a request of a session whose adapters' values come for a step, or one that wants to be such.

    Raises:
        ForbiddenError: the session has no such ports, or it is another kind's request.
        WireError, LimitError: the request is malformed or too large.
    """
    kind = call.key.pass_kind
    if not session.valued:
        raise ForbiddenError("this session was opened without ports of values; open one that names them")
    if kind == pb.PASS_PARK:
        raise ForbiddenError("a session whose adapters' values come for a step parks none; send the values")
    if call.ports and kind != pb.PASS_VALUES:
        raise WireError("only values name ports in such a session")
    if kind == pb.PASS_GRADIENTS:
        _check_parts(call, session)
        return
    if call.parts:
        raise WireError("only a request for gradients names parts")
    if kind == pb.PASS_VALUES:
        for header in call.tensors:
            if header.dtype not in FLOATS or len(header.shape) != 2 or min(header.shape) < 1:
                raise WireError("an adapter's values are matrices of float32, bfloat16 or float16")


def _check_parts(call: pb.Call, session: Session) -> None:
    if session.forward_only and call.parts:
        raise ForbiddenError("this session was opened forward-only; no backward exists in it")
    if call.tensors:
        raise WireError("a request for gradients brings no tensors")
    if len(call.parts) > MOST_PARTS:
        raise LimitError(f"gradients of {len(call.parts)} backwards; {MOST_PARTS} are the limit: use larger ones")
    if len(set(call.parts)) < len(call.parts):
        raise WireError("a backward counts once in a sum; name each part once")


def read_values(ports: Sequence[Port], tensors: Sequence[torch.Tensor]) -> dict[Site, Values]:
    """What came, by site.

    Raises:
        WireError: there are more or fewer tensors than the ports have.
    """
    due = sum(TENSORS[port.kind] for port in ports)
    if len(tensors) != due:
        raise WireError(f"{len(tensors)} tensors do not make the values of {len(ports)} ports, which are {due}")
    left = iter(tensors)
    return {
        (port.block, port.module): Values(port.kind, tuple(next(left) for _ in range(TENSORS[port.kind])))
        for port in ports
    }
