"""One pass of a session through its span, within its turn: with what the edge adds, and what the pass costs.

Knows spans, autograd, ports and clocks; knows no queue, no budget and no names.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cloud_node.activations import Kept, SavedBytes
from cloud_node.engine import Asked, Work
from cloud_node.opened import OpenSession
from cloud_node.pausing import timed
from cloud_node.span import DecodeState
from isthmus.attached import attaching
from isthmus.errors import NotKeptError, WireError
from isthmus.faults import Fault, passing
from isthmus.ledger import span_flops
from isthmus.round_trips import RoundTrips, asking
from isthmus.rows import Rows


def forward(opened: OpenSession, hidden_ND: torch.Tensor, rows: Rows, work: Work, graph: bool, asked: Asked) -> Kept:
    """Run the span on [N, D]; `graph` says whether a backward may follow.

    Raises:
        NotKeptError: the parked adapters that it asks for are gone.
    """
    span = opened.span
    saved = SavedBytes(opened.storages)
    index_N = rows.index() if rows.mask() is not None else None
    with (
        torch.set_grad_enabled(graph),
        _asking(opened, index_N, asked, graph) as trips,
        timed(work, "forward_s"),
        saved.counting(),
    ):
        below = graph and (asked.input_gradient or not opened.ports)
        hidden_ND = hidden_ND.to(span.device, span.dtype).requires_grad_(below)
        output_ND = span.forward(hidden_ND, rows)
        passing(Fault.SERVER_IN_FORWARD)
        span.settle()
    work.forward_flops += span.flops.forward.of(len(rows.lengths), rows.longest)
    work.forward_flops += opened.beside_flops(rows, asked)
    return Kept(hidden_ND, output_ND, rows, saved.total, trips, opened.attached_for(asked) if opened.valued else None)


def forward_tapped(
    opened: OpenSession, hidden_ND: torch.Tensor, rows: Rows, work: Work
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the span on [N, D] without a graph: its output, and the taps at the session's ports, side by side."""
    with timed(work, "forward_s"):
        output_KD, taps_NW = opened.span.forward_tapped(hidden_ND, rows, opened.ports)
        passing(Fault.SERVER_IN_FORWARD)
        opened.span.settle()
    positions = len(rows.lengths) * rows.longest
    projected = span_flops.taps(positions, hidden_ND.shape[1], sum(port.width for port in opened.ports))
    work.forward_flops = opened.span.flops.forward.of(len(rows.lengths), rows.longest) + projected
    return output_KD, taps_NW


def decode(
    opened: OpenSession, hidden_ND: torch.Tensor, rows: Rows, state: DecodeState, work: Work, asked: Asked
) -> torch.Tensor:
    """Run the span on [N, D] after a cached past, which is extended.

    Raises:
        NotKeptError: the parked adapters that it asks for are gone.
    """
    index_N = rows.index(left=True) if rows.mask(left=True) is not None else None
    with _asking(opened, index_N, asked, False), timed(work, "forward_s"):
        output_KD, _ = opened.span.decode(hidden_ND, rows, state)
        opened.span.settle()
    return output_KD


def backward(
    opened: OpenSession, microbatch: int, kept: Kept, grad_KD: torch.Tensor, work: Work, asked: Asked
) -> torch.Tensor:
    """The gradient of the input [N, D]; [0, D] where nothing below the span needs one.

    Gradients of values that came for the step are noted with them under `microbatch`.

    Raises:
        WireError: ports that the forward had are not named.
    """
    grad_KD = grad_KD.to(kept.output_ND.device, kept.output_ND.dtype)
    inputs = [kept.hidden_ND] if kept.hidden_ND.requires_grad else []
    if kept.trips is not None and kept.trips.reached:
        if asked.edge is None:
            raise WireError("this backward belongs to a forward with ports; name them")
        kept.trips.edge = asked.edge
        inputs.append(kept.trips.anchor)
    leaves = kept.attached.leaves if kept.attached is not None else []
    inputs += leaves
    if not inputs:
        return grad_KD[:0]
    # A backward that waits at a port must not hold the device's only autograd thread.
    with torch.autograd.set_multithreading_enabled(False), timed(work, "backward_s"):
        found = torch.autograd.grad(kept.output_ND, inputs, grad_KD, materialize_grads=True)
        passing(Fault.SERVER_IN_BACKWARD)
        opened.span.settle()
    if kept.attached is not None and leaves:
        kept.attached.note(microbatch, found[-len(leaves) :])
    return found[0] if kept.hidden_ND.requires_grad else grad_KD[:0]


@contextmanager
def _asking(
    opened: OpenSession, index_N: torch.Tensor | None, asked: Asked, graph: bool
) -> Iterator[RoundTrips | None]:
    """Add what the edge answers, and what it has parked, in here."""
    if opened.valued:
        with attaching(opened.attached_for(asked)):
            yield None
        return
    version, parked = opened.parked
    if asked.parked and asked.parked != version:
        raise NotKeptError("the parked adapters are gone; send them again")
    if asked.edge is None:
        yield None
        return
    held = parked if asked.parked else {}
    trips = RoundTrips(asked.sites, held, opened.span.linears, asked.edge, index_N, graph, opened.frozen)
    try:
        with asking(trips):
            yield trips
    finally:
        trips.forget()
