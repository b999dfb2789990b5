"""What a backward costs in the lowest block that it reaches: no more than what lies above that block's ports.

Knows one block on the meta device, which stands for each of a span, and counts it with the ports' own machinery; runs
nothing on real data.
"""

import threading
from collections.abc import Collection, Mapping
from functools import lru_cache

import torch
from transformers import DynamicCache, PreTrainedModel

from cloud_node.round_trips import Parked, Question, RoundTrips, asking
from isthmus.blocks import BlockList, capture_at, inject_at, injecting, narrowed, run_blocks
from isthmus.ledger.flops import PassFlops, count
from isthmus.linears import Linear, Site

REMEMBERED = 256
"""Choices of ports whose cost is known; each takes a block's passes on the meta device to count."""


class LowestBlock:
    """A block below which no gradient is wanted, so that its own ports decide what a backward computes in it."""

    def __init__(
        self, twin: PreTrainedModel, found: BlockList, number: int, dtype: torch.dtype, linears: Mapping[Site, Linear]
    ) -> None:
        """Stand for the blocks of a span.

        Args:
            twin: the span's model on the meta device, whose linear modules ask as the span's do.
            found: its blocks.
            number: of the block that is taken for all; nothing is built before it is asked for.
            dtype: to compute in.
            linears: the span's.
        """
        self._given = twin, found
        self._number = number
        self._dtype = dtype
        self._linears = linears
        self._lock = threading.Lock()
        self._built: tuple[PreTrainedModel, BlockList] | None = None
        self._known = lru_cache(REMEMBERED)(self._count)

    def backward(self, modules: Collection[str], parked: Mapping[str, Parked]) -> PassFlops:
        """Of a block with the edge's ports at `modules`, and adapters parked at others, by their names in it."""
        ranks = frozenset((name, len(adapter.down_RI)) for name, adapter in parked.items())
        with self._lock:
            return self._known(frozenset(modules), ranks)

    def _count(self, modules: frozenset[str], ranks: frozenset[tuple[str, int]]) -> PassFlops:
        twin, found = self._built = self._built or self._alone()
        held = {(self._number, name): self._outline(name, rank) for name, rank in ranks}
        active = [(self._number, name) for name in modules]

        def run(tokens: int, _: int) -> torch.Tensor:
            size = twin.config.get_text_config().hidden_size
            hidden_BTD = torch.empty(1, tokens, size, dtype=self._dtype, device="meta")
            trips = RoundTrips(active, held, self._linears, _Nobody(), None, graph=True)
            with asking(trips), injecting(hidden_BTD) as captured:
                run_blocks(twin.base_model, found.blocks, hidden_BTD, cache=DynamicCache())
            return captured[0]

        return count(run).backward

    def _alone(self) -> tuple[PreTrainedModel, BlockList]:
        twin, found = narrowed(*self._given, (self._number,))
        inject_at(found.blocks[self._number])
        capture_at(found.blocks[self._number])
        return twin, found

    def _outline(self, name: str, rank: int) -> Parked:
        linear = self._linears[self._number, name]
        shapes = (rank, linear.inputs), (linear.outputs, rank)
        return Parked(*(torch.empty(shape, dtype=self._dtype, device="meta") for shape in shapes))


class _Nobody:
    """Answers in shapes, for which the cloud computes nothing."""

    def ask(self, question: Question) -> list[torch.Tensor]:
        tokens = len(question.tensors[0])
        return [torch.empty(tokens, width, device="meta") for width in question.widths]
