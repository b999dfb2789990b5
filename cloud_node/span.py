"""The span of a model as a function: hidden states in, hidden states out, with or without a cache.

Knows PyTorch modules and rows of tokens; knows no sessions, no wire and no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from isthmus.architectures import reads_both_ways
from isthmus.attached import attach_at
from isthmus.blocks import BlockList, capture_at, inject_at, injecting, run_blocks
from isthmus.cut import Cut
from isthmus.errors import CutError
from isthmus.ledger.flops import ModelFlops, on_meta
from isthmus.ledger.lowest import LowestBlock
from isthmus.ledger.span_flops import count_span
from isthmus.linears import Linear, Site, find_linears
from isthmus.ports import Port, tap_at, tapping
from isthmus.round_trips import ask_at
from isthmus.rows import Rows, pack, pad


@dataclass
class DecodeState:
    """The cached past of one sequence: `mask_BT` over its padded width and the requests that made it, in order."""

    cache: DynamicCache
    mask_BT: torch.Tensor
    made_by: list[tuple[int, int]]  # (microbatch, width after it)

    @classmethod
    def empty(cls, rows: int) -> "DecodeState":
        """A sequence of so many rows that has not begun."""
        # Full caches: a sliding one could not be truncated.
        return cls(DynamicCache(), torch.ones(rows, 0, dtype=torch.long), [])

    @property
    def width(self) -> int:
        """Cached tokens of each row, left padding included."""
        return self.mask_BT.shape[1]

    @property
    def size(self) -> int:
        """Bytes of keys and values."""
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(
            int(tensor.nbytes) for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None
        )

    def see(self, rows: Rows) -> None:
        """Widen the mask by the tokens of `rows`."""
        mask_BT = rows.mask(left=True)
        fresh_BT = torch.ones(len(rows.lengths), rows.longest, dtype=torch.long) if mask_BT is None else mask_BT
        self.mask_BT = torch.cat([self.mask_BT, fresh_BT], 1)

    def truncate(self, width: int) -> None:
        """Forget what stands beyond `width` tokens."""
        if width < self.width:
            self.cache.crop(width - self.width)
        self.mask_BT = self.mask_BT[:, :width]
        self.made_by = [(maker, reached) for maker, reached in self.made_by if reached <= width]


class Span:
    """Blocks `cut.span` of a model, frozen, in evaluation mode.

    Attributes:
        storages: bytes of its weights' and buffers' storages by address.
        lowest: what of a backward is computed in the lowest block that it reaches.
        joins: a row's output does not depend on the rows beside it; LLM.int8 looks for outliers in all of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        found: BlockList,
        cut: Cut,
        dtype: torch.dtype | None = None,
        quantized: str | None = None,
        counted: tuple[PreTrainedModel, BlockList] | None = None,
    ) -> None:
        """Run these blocks.

        Args:
            model: which runs no others.
            found: its blocks.
            cut: what of it is the span.
            dtype: to compute in; None: that of the weights.
            quantized: how weights are held, where it is not in their own type.
            counted: the same model with plain weights on the meta device, to count FLOPs on; None: this one's copy.
        """
        self.cut = cut
        self.joins = quantized != "int8"
        self.blocks = cut.span(len(found.blocks))
        self._base, self._found = model.base_model, found
        self.device = next(model.parameters()).device
        self.dtype = dtype or next(model.parameters()).dtype
        self.precision = str(self.dtype).removeprefix("torch.") + (f", {quantized} weights" if quantized else "")
        held = [tensor.untyped_storage() for tensor in (*self._base.parameters(), *self._base.buffers())]
        self.storages = {storage.data_ptr(): storage.nbytes() for storage in held}
        self._hook(found)
        for number in cut.span(len(found.blocks)):
            tap_at(found.blocks[number], number)
        self.linears = self._find_linears(found)
        ask_at(found, self.blocks)
        attach_at(found, self.blocks)
        if counted is not None:
            self._hook(counted[1])
            ask_at(counted[1], self.blocks)
        twin: Any = counted[0] if counted is not None else on_meta(model)
        self.flops = self._count_flops(twin)
        self.lowest = LowestBlock(twin, found, self.blocks, self.dtype, self.linears)

    def module(self, site: Site) -> nn.Module:
        """One of its linear modules."""
        return self._found.blocks[site[0]].get_submodule(site[1])

    def _hook(self, found: BlockList) -> None:
        inject_at(found.blocks[self.blocks[0]])
        capture_at(found.blocks[self.blocks[-1]])

    def forward(self, hidden_ND: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Run the span: [N, D] to [wanted, D], in the span's dtype; differentiable in `hidden_ND`."""
        hidden_ND = hidden_ND.to(self.device, self.dtype)
        index = None if rows.mask() is None else rows.index()
        hidden_BTD = pad(hidden_ND, index, (len(rows.lengths), rows.longest))
        output_BTD = self._run(hidden_BTD, rows.mask(), rows.positions(), None)
        output_ND = pack(output_BTD, index)
        return output_ND if rows.wanted_N is None else output_ND[rows.wanted_N.to(self.device)]

    @torch.no_grad()
    def forward_tapped(
        self, hidden_ND: torch.Tensor, rows: Rows, ports: Sequence[Port]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, and the taps at `ports` side by side: [N, the sum of their widths]."""
        with tapping(ports) as taps:
            output_KD = self.forward(hidden_ND, rows)
        index = None if rows.mask() is None else rows.index()
        return output_KD, torch.cat([pack(taps[port.block], index) for port in ports], -1)

    @torch.no_grad()
    def decode(
        self, hidden_ND: torch.Tensor, rows: Rows, state: DecodeState | None
    ) -> tuple[torch.Tensor, DecodeState]:
        """Run the span after the cached past (rows are padded on the left), extending it: [N, D] to [wanted, D].

        Raises:
            CutError: its tokens see those behind them, so that nothing is ever past.
        """
        if reads_both_ways(self._base.config):
            raise CutError(f"{self._base.config.model_type} keeps no keys and values; ask for whole rows")
        hidden_ND = hidden_ND.to(self.device, self.dtype)
        index = None if rows.mask(left=True) is None else rows.index(left=True)
        state = DecodeState.empty(len(rows.lengths)) if state is None else state
        state.see(rows)
        hidden_BTD = pad(hidden_ND, index, (len(rows.lengths), rows.longest))
        output_BTD = self._run(hidden_BTD, state.mask_BT, rows.positions(left=True), state.cache)
        output_ND = pack(output_BTD, index)
        return (output_ND if rows.wanted_N is None else output_ND[rows.wanted_N.to(self.device)]), state

    def settle(self) -> None:
        """Wait until the device has done what it was given: a GPU's kernels are queued, and a turn would end unseen."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _run(
        self,
        hidden_BTD: torch.Tensor,
        mask_BT: torch.Tensor | None,
        positions_BT: torch.Tensor,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        mask_BT = None if mask_BT is None else mask_BT.to(self.device)
        with injecting(hidden_BTD) as captured:
            run_blocks(
                self._base, self._found.blocks, hidden_BTD.detach(), mask_BT, positions_BT.to(self.device), cache
            )
        return captured[0]

    @torch.no_grad()
    def _find_linears(self, found: BlockList) -> dict[Site, Linear]:
        size = self._base.config.get_text_config().hidden_size
        two_ND = torch.zeros(2, size, device=self.device, dtype=self.dtype)
        numbers = self.cut.span(len(found.blocks))
        return find_linears(found, numbers, lambda: self.forward(two_ND, Rows((2,), (0,))))

    def _count_flops(self, model: Any) -> ModelFlops:
        return count_span(model, model.get_submodule(self._found.path), self.dtype)
