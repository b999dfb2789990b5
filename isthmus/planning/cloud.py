"""The cloud's part of a run, from a model's configuration: what its passes compute, and what they ask at ports.

Knows the span on the meta device; knows no messages, no schedule and nothing of the edge but where it takes part.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedConfig

from isthmus.blocks import capture_at, inject_at, narrowed, route_by_token
from isthmus.cut import Cut
from isthmus.ledger import span_flops
from isthmus.ledger.flops import ModelFlops, PassFlops
from isthmus.ledger.lowest import LowestBlock
from isthmus.linears import Linear, Site
from isthmus.planning.figures import SideFlops
from isthmus.planning.placed import place_span
from isthmus.planning.questions import Questions
from isthmus.planning.span_memory import SpanMemory
from isthmus.ports import ASKING, CORE, VALUES, Port
from isthmus.round_trips import ask_at
from isthmus.rows import Rows


class PlannedSpan:
    """The span of a run.

    Attributes:
        blocks: that it runs.
        questions: what its passes ask at ports.
    """

    def __init__(
        self,
        configuration: PreTrainedConfig,
        cut: Cut,
        dtype: torch.dtype,
        ports: tuple[Port, ...],
        linears: Mapping[Site, Linear],
    ) -> None:
        """Place it on the meta device and count its passes.

        Raises:
            CutError, ModelError: the model cannot be cut so.
        """
        self.model, self.found = place_span(configuration, cut, dtype)
        self.dtype, self._cut = dtype, cut
        self.blocks = cut.span(len(self.found.blocks))
        self._ports = ports
        self._lowest = self._stands_for_all(linears)
        self._ranks = {(port.block, port.module): port.rank for port in ports if port.kind == CORE}
        self.questions = Questions(self.model, self.found, linears, self._ranks)
        self._flops = self._counted()

    def _stands_for_all(self, linears: Mapping[Site, Linear]) -> LowestBlock:
        first = self.blocks[0]
        twin, found = narrowed(self.model, self.found, [first])
        ask_at(found, [first])
        return LowestBlock(twin, found, self.blocks, self.dtype, linears)

    def _counted(self) -> ModelFlops:
        """Both passes of the span: of one block of each kind, as often as there are such."""
        kinds = Counter(_kind(self.found.blocks[number]) for number in self.blocks)
        total = ModelFlops(PassFlops(0, 0), PassFlops(0, 0))
        for number in self.blocks:
            times = kinds.pop(_kind(self.found.blocks[number]), 0)
            if times:
                model, found = narrowed(self.model, self.found, [number])
                inject_at(found.blocks[number])
                capture_at(found.blocks[number])
                route_by_token(model)
                total += span_flops.count_span(model, found.blocks, self.dtype) * times
        return total

    @cached_property
    def memory(self) -> SpanMemory:
        """What it holds: of whichever run, for what was counted once need not be counted again."""
        return SpanMemory((self.model, self.found), self._cut)

    @property
    def hidden_size(self) -> int:
        """Values a token that go in and come out."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def answers_ports(self) -> bool:
        """Whether the edge answers at its ports."""
        return any(port.kind in ASKING for port in self._ports)

    @property
    def valued(self) -> bool:
        """Whether values of the edge's adapters come once a step, to be computed with here."""
        return any(port.kind in VALUES for port in self._ports)

    @property
    def taps(self) -> int:
        """Values a token of all taps together."""
        return sum(port.width for port in self._ports)

    def passes(
        self, rows: Rows, keeps: bool, below: bool, active: frozenset[Site], parked: Mapping[Site, int]
    ) -> SideFlops:
        """Floating-point operations of a forward and, if that `keeps` its activations, of the backward.

        Args:
            rows: of the request.
            keeps: a backward follows.
            below: the gradient of the span's input is wanted.
            active: the ports that take part.
            parked: ranks of the adapters that are added without the edge: parked at other ports, or come for a step.
        """
        shape = len(rows.lengths), rows.longest
        positions = shape[0] * shape[1]
        cores = {site: rank for site, rank in self._ranks.items() if site in active}
        beside = [*parked.items(), *cores.items()]
        added = span_flops.parked(positions, sum(self._lowest.values(*one) for one in beside))
        reduced = span_flops.taps(positions, self.hidden_size, self.taps)
        forward, whole = self._flops.forward.of(*shape) + added + reduced, self._flops.backward
        if self.valued:
            through = whole.of(*shape) if below else self._lowest.down_to(whole, shape, active, {}, {})
            return SideFlops(forward, through + 2 * added)  # both gradients of what was added
        if not keeps:
            return SideFlops(forward)
        if below or not self.answers_ports:
            return SideFlops(forward, whole.of(*shape) + added)
        return SideFlops(forward, self._lowest.down_to(whole, shape, active, parked, cores))


def _kind(block: nn.Module) -> tuple[object, ...]:
    """What is the same of blocks that compute as much: their modules and the shapes of their weights, by name."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, one.shape) for name, one in block.named_parameters())
