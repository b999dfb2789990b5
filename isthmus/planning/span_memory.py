"""Live tensors of a cloud node that serves one run: its span's weights, and what forwards keep for their backwards.

Knows the span on the meta device, rows and the places where the edge takes part; knows no session and no budget, and
that nothing has to be given up for want of room.
"""

from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from isthmus.blocks import BlockList, capture_at, inject_at, injecting, run_blocks
from isthmus.cut import Cut
from isthmus.ledger.memory import TensorPeak
from isthmus.linears import Site
from isthmus.planning.memory import Keeping, route_as_told
from isthmus.planning.placed import Placed
from isthmus.rows import Rows, pack, pad


class SpanMemory:
    """The memory of a span.

    Attributes:
        weight_bytes: of its parameters and buffers.
        dtype: what it computes in.
    """

    def __init__(self, span: Placed, cut: Cut) -> None:
        """Take a model that has nothing but the span's blocks, on the meta device; it is this object's from now on."""
        self._model, self._found = span
        numbers = cut.span(len(self._found.blocks))
        inject_at(self._found.blocks[numbers[0]])
        capture_at(self._found.blocks[numbers[-1]])
        route_as_told(self._model)
        self._base = self._model.base_model
        self.weight_bytes = TensorPeak(self._base).resident_bytes
        self.dtype: torch.dtype = self._model.dtype
        self._counted: dict[Hashable, int] = {}

    def graph_bytes(self, rows: Rows, below: bool, sites: Collection[Site] = ()) -> int:
        """Bytes that a forward of `rows` keeps for its backward.

        Args:
            rows: of the request.
            below: the gradient of what goes in is wanted.
            sites: linear modules at which the edge takes part.
        """
        key = rows.lengths, rows.wanted_N is None or rows.returned, below, frozenset(sites)
        if key not in self._counted:
            self._counted[key] = self._count(rows, below, sites)
        return self._counted[key]

    def _count(self, rows: Rows, below: bool, sites: Collection[Site]) -> int:
        size = self._model.config.get_text_config().hidden_size
        hidden_ND = torch.empty(rows.tokens, size, dtype=self.dtype, device="meta", requires_grad=below)
        keeping = Keeping(self._base)
        with keeping.counting(rows.mask() is not None), _answering(self._found, sites):
            output_KD = self._forward(hidden_ND, rows)
        kept = keeping.kept_bytes
        del output_KD  # which has held the graph
        return kept

    def _forward(self, hidden_ND: torch.Tensor, rows: Rows) -> torch.Tensor:
        """As `cloud_node.span.Span.forward`."""
        mask_BT = rows.mask()
        index_N = None if mask_BT is None else rows.index().to("meta")
        mask_BT = None if mask_BT is None else mask_BT.to("meta")
        hidden_BTD = pad(hidden_ND, index_N, (len(rows.lengths), rows.longest))
        with injecting(hidden_BTD) as captured:
            run_blocks(self._base, self._found.blocks, hidden_BTD.detach(), mask_BT, rows.positions().to("meta"))
        output_ND = pack(captured[0], index_N)
        if rows.wanted_N is None:
            return output_ND
        return output_ND.index_select(0, rows.wanted_N.nonzero()[:, 0].to("meta"))


@contextmanager
def _answering(found: BlockList, sites: Collection[Site]) -> Iterator[None]:
    """Add to what these modules put out something that needs a gradient, and of which the span keeps nothing."""
    anchor = torch.zeros((), device="meta", requires_grad=True)

    def add(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = _Answer.apply(output.detach(), anchor)  # type: ignore[no-untyped-call]
        return output + added

    hooks = [found.blocks[number].get_submodule(name).register_forward_hook(add) for number, name in sites]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Answer(torch.autograd.Function):
    """What comes from the edge; its backward is never run."""

    @staticmethod
    def forward(_context: Any, like: torch.Tensor, _anchor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(like)
