"""What a backward costs in the lowest block that it reaches: no more than what lies above that block's ports.

Knows one block on the meta device, which stands for each of a span, and counts it with the ports' own machinery; runs
nothing on real data.
"""

import threading
from collections.abc import Collection, Mapping
from functools import lru_cache

import torch
from transformers import DynamicCache, PreTrainedModel

from isthmus.blocks import BlockList, capture_at, inject_at, injecting, narrowed, run_blocks
from isthmus.cores import Frozen, outline
from isthmus.ledger import span_flops
from isthmus.ledger.flops import PassFlops, count
from isthmus.linears import Linear, Site
from isthmus.round_trips import Parked, Question, RoundTrips, asking

REMEMBERED = 256
"""Choices of ports whose cost is known; each takes a block's passes on the meta device to count."""


class LowestBlock:
    """A block below which no gradient is wanted, so that its own ports decide what a backward computes in it."""

    def __init__(
        self, twin: PreTrainedModel, found: BlockList, span: range, dtype: torch.dtype, linears: Mapping[Site, Linear]
    ) -> None:
        """Stand for the blocks of a span, the first of which is taken for all; nothing is built before it is asked for.

        Args:
            twin: the span's model on the meta device, whose linear modules ask as the span's do.
            found: its blocks.
            span: numbers of the span's blocks.
            dtype: to compute in.
            linears: the span's.
        """
        self._given = twin, found
        self._span = span
        self._number = span[0]
        self._dtype = dtype
        self._linears = linears
        self._lock = threading.Lock()
        self._built: tuple[PreTrainedModel, BlockList] | None = None
        self._known = lru_cache(REMEMBERED)(self._count)

    def down_to(
        self,
        whole: PassFlops,
        shape: tuple[int, int],
        sites: Collection[Site],
        parked: Mapping[Site, int],
        cores: Mapping[Site, int],
    ) -> int:
        """Floating-point operations of a backward that ends at the lowest of the edge's ports.

        Args:
            whole: of a backward of the whole span.
            shape: rows, and the positions of each, padding included.
            sites: the edge's ports.
            parked: ranks of the adapters that are added without the edge, at other ports.
            cores: ranks of those that the edge has at its ports, where it has no whole adapters.
        """
        if not sites:
            return 0
        lowest = min(block for block, _ in sites)
        added = [*parked.items(), *cores.items()]
        above = sum(self.values(site, rank) for site, rank in added if site[0] > lowest)
        beside = {name: rank for (block, name), rank in parked.items() if block == lowest}
        around = {name: rank for (block, name), rank in cores.items() if block == lowest}
        within = self.backward([name for block, name in sites if block == lowest], beside, around)
        through = (self._span[-1] - lowest) / len(self._span)
        return round(whole.of(*shape) * through) + span_flops.parked(shape[0] * shape[1], above) + within.of(*shape)

    def values(self, site: Site, rank: int) -> int:
        """Parameters of an adapter of this rank."""
        return rank * (self._linears[site].inputs + self._linears[site].outputs)

    def backward(
        self, modules: Collection[str], parked: Mapping[str, int], cores: Mapping[str, int] | None = None
    ) -> PassFlops:
        """Of a block with the edge's ports at `modules`, and adapters of some ranks parked at others of its modules.

        `cores` are the ranks of those that the edge has at its ports; none where it has whole adapters.
        """
        with self._lock:
            return self._known(frozenset(modules), frozenset(parked.items()), frozenset((cores or {}).items()))

    def _count(
        self, modules: frozenset[str], ranks: frozenset[tuple[str, int]], cores: frozenset[tuple[str, int]]
    ) -> PassFlops:
        twin, found = self._built = self._built or self._alone()
        held = {(self._number, name): Parked(*self._outline(name, rank)) for name, rank in ranks}
        frozen = {(self._number, name): Frozen(*self._outline(name, rank)) for name, rank in cores} or None
        active = [(self._number, name) for name in modules]

        def run(tokens: int, _: int) -> torch.Tensor:
            size = twin.config.get_text_config().hidden_size
            hidden_BTD = torch.empty(1, tokens, size, dtype=self._dtype, device="meta")
            trips = RoundTrips(active, held, self._linears, _Nobody(), None, True, frozen)
            with asking(trips), injecting(hidden_BTD) as captured:
                run_blocks(twin.base_model, found.blocks, hidden_BTD, cache=DynamicCache())
            return captured[0]

        return count(run).backward

    def _alone(self) -> tuple[PreTrainedModel, BlockList]:
        twin, found = narrowed(*self._given, (self._number,))
        inject_at(found.blocks[self._number])
        capture_at(found.blocks[self._number])
        return twin, found

    def _outline(self, name: str, rank: int) -> list[torch.Tensor]:
        return [matrix.to(self._dtype) for matrix in outline(self._linears[self._number, name], rank)]


class _Nobody:
    """Answers in shapes, for which the cloud computes nothing."""

    def ask(self, question: Question) -> list[torch.Tensor]:
        tokens = len(question.tensors[0])
        return [torch.empty(tokens, width, device="meta") for width in question.widths]
