"""Where the edge takes part in the span: ports, declared when a session opens and attached for that session alone.

Knows blocks by number, projections, and how a tensor leaves a block while a call runs; knows no session and no wire
beyond its own message. A tap is a block's output, reduced and sent, and nothing returns; a lora port is a linear
module, whose input leaves and to whose output something is added; at a core port, only what frozen factors leave of it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from isthmus.blocks import during_calls
from isthmus.core_shape import INITS, MAX_RANK
from isthmus.cut import Cut
from isthmus.errors import LimitError, UsageError, WireError
from isthmus.linears import Linear, Site
from isthmus.wire.gen import backbone_pb2 as pb

TAP, LORA, CORE = "tap", "lora", "core"
LORA_VALUES = "lora-values"

ASKING = (LORA, CORE)
"""Kinds at which a pass waits for the edge."""

VALUES = (LORA_VALUES,)
"""Linear modules whose adapters' values come for a step; what each has is in `isthmus.attached`."""

KINDS = (TAP, *ASKING, *VALUES)

MAX_WIDTH = 1024
"""Of a tap: its projection is made when a session first asks for it."""

MAX_TIMES_HIDDEN = 4
"""All taps of a session together are at most so many times the hidden size: what leaves stays near what came."""


@dataclass(frozen=True, order=True)
class Port:
    """A place in block `block`.

    Attributes:
        block: its number in the whole model.
        width: of a tap, which is the block's output: values a token after the projection.
        module: of the others: the linear module's name within the block.
        kind: one of `KINDS`.
        rank: of a core.
        init: how the factors around a core are made; see `isthmus.cores`.
        seed: of those that are drawn.
    """

    block: int
    width: int = 0
    module: str = ""
    kind: str = TAP
    rank: int = 0
    init: str = ""
    seed: int = 0

    def to_wire(self) -> pb.Port:
        """The message that says the same."""
        return pb.Port(
            kind=self.kind,
            block=self.block,
            width=self.width,
            module=self.module,
            rank=self.rank,
            init=self.init,
            seed=self.seed,
        )

    @classmethod
    def from_wire(cls, message: pb.Port) -> "Port":
        """Read a peer's port; whether it fits the span is `check_ports`'s to say.

        Raises:
            WireError: it is of an unknown kind.
        """
        if message.kind not in KINDS:
            raise WireError(f"no port of kind {message.kind!r:.20}; this version knows {', '.join(KINDS)}")
        cores = message.rank, message.init, message.seed
        return cls(message.block, message.width, message.module, message.kind, *cores)


def every(step: int, cut: Cut, blocks: int, width: int) -> tuple[Port, ...]:
    """Taps at every `step`-th block of the span, counted back from its last, lowest first.

    The last itself has none: its output crosses whole.

    Raises:
        UsageError: the span is too short for one.
    """
    span = cut.span(blocks)
    numbers = sorted(range(span[-1] - step, span[0] - 1, -step))
    if not numbers:
        raise UsageError(f"a span of {len(span)} blocks has no tap at every {step} blocks; lower --tap-every")
    return tuple(Port(number, width) for number in numbers)


def check_ports(ports: Sequence[Port], cut: Cut, blocks: int, hidden_size: int, linears: Mapping[Site, Linear]) -> None:
    """Judge a peer's ports; `linears` are the linear modules by block and name.

    Raises:
        WireError: one is outside the span, too wide, out of order, or there twice.
        LimitError: together they are too wide.
    """
    span = cut.span(blocks)
    if list(ports) != sorted(set(ports)) or len({(port.block, port.module) for port in ports}) < len(ports):
        raise WireError("ports must be in the order of their blocks, one at each place")
    if len({port.kind for port in ports}) > 1:
        raise WireError("a session's ports are of one kind")
    for port in ports:
        if port.block not in span:
            raise WireError(f"block {port.block} of a port is outside the span {span[0]} to {span[-1]}")
        if port.kind != TAP and ((port.block, port.module) not in linears or port.width):
            raise WireError(f"no linear module {port.module!r:.60} in block {port.block}")
        if port.kind != CORE and (port.rank or port.init or port.seed):
            raise WireError(f"a rank, an init and a seed are of {CORE} ports; leave them out")
        if port.kind == CORE:
            _check_core(port, ports[0], linears[port.block, port.module])
        if port.kind != TAP:
            continue
        if port.module:
            raise WireError("a tap is of a whole block; leave out the module")
        if not 1 <= port.width <= min(hidden_size, MAX_WIDTH):
            raise WireError(f"a tap of width {port.width} is outside 1 to {min(hidden_size, MAX_WIDTH)}")
    if sum(port.width for port in ports) > MAX_TIMES_HIDDEN * hidden_size:
        raise LimitError(f"taps of over {MAX_TIMES_HIDDEN * hidden_size} values a token; take fewer or narrower ones")


def _check_core(port: Port, first: Port, linear: Linear) -> None:
    if (port.rank, port.init, port.seed) != (first.rank, first.init, first.seed):
        raise WireError("a session's cores are of one rank, one init and one seed")
    if port.init not in INITS:
        raise WireError(f"no way {port.init!r:.20} to make the factors of cores; use {' or '.join(INITS)}")
    most = min(MAX_RANK, linear.inputs, linear.outputs)
    if not 1 <= port.rank <= most:
        raise WireError(f"a core of rank {port.rank} at {port.module} of block {port.block}; 1 to {most} fit there")


@lru_cache(maxsize=16)
def projection(
    hidden_size: int, width: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> torch.Tensor:
    """The fixed reduction of taps: [D, W] with orthonormal columns, the same everywhere.

    The Q of a seeded Gaussian matrix: a random subspace, which keeps distances (Johnson and Lindenstrauss, 1984).
    """
    gaussian = torch.randn(hidden_size, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    orthonormal: torch.Tensor = torch.linalg.qr(gaussian).Q
    return orthonormal.contiguous().to(device, dtype)


Taps = dict[int, torch.Tensor]
"""What was tapped in one call: [B, T, W] by block number."""


@dataclass(frozen=True)
class _Call:
    widths: Mapping[int, int]
    taps: Taps


_call: ContextVar[_Call | None] = ContextVar("tapped_call", default=None)


def tap_at(block: nn.Module, number: int) -> None:
    """Let calls inside `tapping` take what leaves `block`; other calls pass it as if nothing were there."""

    def take(_: nn.Module, __: Any, output: Any) -> None:
        call = _call.get()
        if call is not None and number in call.widths:
            hidden_BTD = output[0] if isinstance(output, tuple) else output
            matrix_DW = projection(hidden_BTD.shape[-1], call.widths[number], hidden_BTD.dtype, hidden_BTD.device)
            call.taps[number] = hidden_BTD.detach() @ matrix_DW

    block.register_forward_hook(take)


@contextmanager
def tapping(ports: Iterable[Port]) -> Iterator[Taps]:
    """Take taps at `ports` from what this thread runs in here."""
    taps: Taps = {}
    token = _call.set(_Call({port.block: port.width for port in ports}, taps))
    try:
        yield taps
    finally:
        _call.reset(token)


def tapped() -> Taps:
    """The taps of the call that runs in this thread; whoever computes the span adds them."""
    call = _call.get()
    return call.taps if call is not None else {}


def tap_calls_of(owner: nn.Module, ports: Iterable[Port]) -> None:
    """Make every call of `owner`, which runs the blocks, one inside `tapping`."""
    widths = {port.block: port.width for port in ports}
    during_calls(owner, _call, lambda _: _Call(widths, {}))
