"""What stands for the span while an edge's pass is planned: it returns shapes, and autograd keeps of it what it would.

Knows rows, taps and modules on the meta device; knows no line and no method.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edge_client.cached import CachedSpan, Spared
from edge_client.remote import RemoteSpan
from isthmus.blocks import BlockList, PassThrough
from isthmus.ports import tapped
from isthmus.rows import Rows, pack, pad

Arriving = Callable[[bool], None]


class AbsentSpan(PassThrough):
    """Stands at a remote span's first block.

    Attributes:
        rows: what is sent in the pass to come.
        arriving: called when the pass is here, with whether the gradient of what is sent is wanted.
    """

    def __init__(self, number: int, found: BlockList, replaced: nn.Module, trains: bool) -> None:
        """Stand for `replaced`; `trains` says that something in the span does."""
        super().__init__(number, found.returns_tuple, replaced)
        self._trains = trains
        self.rows = Rows((1,), (0,))
        self.arriving: Arriving = lambda _: None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `edge_client.remote.RemoteSpan`, without a cache."""
        rows, shape = self.rows, (hidden_states.shape[0], hidden_states.shape[1])
        index_N = None if rows.mask() is None else rows.index().to("meta")
        packed_ND = pack(hidden_states, index_N)
        self.arriving(packed_ND.requires_grad)
        anchor = torch.zeros((), device="meta", requires_grad=self._trains)
        output_KD: torch.Tensor = _Passes.apply(packed_ND, anchor, rows.returned)  # type: ignore[no-untyped-call]
        if rows.wanted_N is not None:
            index_N = (torch.arange(rows.tokens) if index_N is None else rows.index())[rows.wanted_N]
        return super().forward(pad(output_KD, index_N, shape), *args, **kwargs)


class _Passes(torch.autograd.Function):
    """A pass through the span; its backward is never run."""

    @staticmethod
    def forward(_context: Any, hidden_ND: torch.Tensor, _anchor: torch.Tensor, returned: int) -> torch.Tensor:
        return hidden_ND.new_empty(returned, hidden_ND.shape[1])


class _Known(PassThrough):
    """Stands at the first block of a span whose outputs are read from the cache, and below it, where nothing runs."""

    def __init__(self, number: int, found: BlockList, replaced: nn.Module) -> None:
        super().__init__(number, found.returns_tuple, replaced)
        self._ports = replaced.ports if isinstance(replaced, CachedSpan) else ()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        widths = [port.width for port in self._ports]
        if widths:
            taps = torch.split(hidden_states.new_empty(*hidden_states.shape[:2], sum(widths)), widths, -1)
            tapped().update({port.block: tap for port, tap in zip(self._ports, taps, strict=True)})
        return super().forward(hidden_states, *args, **kwargs)


def stand_in(model: nn.Module, found: BlockList, trains: bool) -> AbsentSpan | None:
    """Put these where `model` would ask for the span's outputs; returns the one that sends, if any."""
    sends = None
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for number, block in enumerate(blocks):
            if isinstance(block, RemoteSpan):
                blocks[number] = sends = AbsentSpan(number, found, block, trains)
            elif isinstance(block, CachedSpan | Spared):
                blocks[number] = _Known(number, found, block)
    return sends
