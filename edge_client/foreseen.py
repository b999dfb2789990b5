"""What one microbatch will move between both sides, and what the cloud and its ports will compute for it.

Knows what is placed where, what a session agrees on, and rows; knows no schedule and no links.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from edge_client.alive import PartOfStep
from edge_client.cached import requests_of
from edge_client.config import TrainConfig
from edge_client.edge_model import answers_where_wanted
from edge_client.placed import PlacedEdge
from edge_client.port_adapters import matrices_of, sizes_of
from isthmus.ledger import span_flops
from isthmus.linears import Site
from isthmus.planning.cloud import PlannedSpan
from isthmus.planning.crossing import Agreed, Part, apart, at_port, backward_pass, forward_pass, parked, values
from isthmus.planning.figures import Crossing, Leg, SideFlops, Step
from isthmus.planning.legs import Asked, legs_of
from isthmus.planning.questions import PortQuestion
from isthmus.planning.wire import cost_of
from isthmus.rows import Rows

CALL_BYTES = 1 << 28
"""Of one answer at most, as a node has it unless it is told otherwise."""


@dataclass(frozen=True)
class Microbatch:
    """Some rows of a batch.

    Attributes:
        lengths: tokens of each, those of a prompt included.
        losses: positions of each that carry loss.
    """

    lengths: tuple[int, ...]
    losses: tuple[int, ...]

    def some(self, numbers: list[int]) -> "Microbatch":
        """Those of its rows."""
        return Microbatch(*(tuple(each[number] for number in numbers) for each in (self.lengths, self.losses)))

    def rows(self, topmost: bool) -> Rows:
        """As they cross; where the span is `topmost`, the positions that carry loss alone come back."""
        starts = (0,) * len(self.lengths)
        if not topmost:
            return Rows(self.lengths, starts)
        pairs = zip(self.lengths, self.losses, strict=True)
        return Rows(
            self.lengths, starts, torch.cat([torch.arange(length) >= length - count for length, count in pairs])
        )


class OverTheWire:
    """A session that a run would open."""

    def __init__(self, settings: TrainConfig, placed: PlacedEdge, span: PlannedSpan) -> None:
        """Find out what its passes need: whether a backward follows a forward, and how far down it goes."""
        self._placed, self._span, self._alone = placed, span, settings.deterministic
        self._topmost = answers_where_wanted(placed.cut, placed.edge.found)
        self._adapters = placed.edge.adapters
        self._layers = self._adapters.layers if self._adapters is not None else {}
        self._matrices = {site: matrices_of(layer) for site, layer in self._layers.items()}
        below = not settings.forward_only and placed.trains_below
        self._agreed = Agreed(
            hidden_size=span.hidden_size,
            edge_dtype=placed.edge.model.dtype,
            span_dtype=span.dtype,
            activation=settings.codec,
            gradient=settings.gradient_codec,
            port=settings.port_codec,
            keeps=below or span.answers_ports or span.valued,
            below=below,
            taps=span.taps,
            answers_ports=span.answers_ports or span.valued,
        )

    def asked_once(self, batch: Microbatch) -> Step:
        """The span's outputs for these rows, each answered apart, for the edge to keep."""
        agreed, total = self._agreed, Step()
        for numbers in requests_of(batch.lengths, agreed.hidden_size + agreed.taps, CALL_BYTES, self._alone):
            rows = batch.some(numbers).rows(self._topmost)
            cloud = self._span.passes(rows, keeps=False, below=False, active=frozenset(), parked={})
            below = self._placed.below.flops.of(len(rows.lengths), rows.longest) if self._placed.below else 0
            total += Step(apart(agreed, rows, cost_of(int(cloud.forward))), SideFlops(below), cloud)
        return total

    def trained(self, batch: Microbatch, part: PartOfStep) -> Step:
        """Both passes of the span; of the edge, what its ports compute."""
        rows = batch.rows(self._topmost)
        cloud = self._computed(rows, part)
        total = Step(cloud=cloud)
        for crossing in self._passes(rows, part, cloud):
            total += Step(crossing)
        for asked in self._asked(rows, part):
            total += Step(asked.crossing, self._answered(asked.question, rows.tokens))
        return total

    def legs(self, batch: Microbatch, part: PartOfStep) -> tuple[Leg, ...]:
        """A microbatch's legs, in their order."""
        rows = batch.rows(self._topmost)
        forward, *backward = self._passes(rows, part, self._computed(rows, part))
        return legs_of(self._span.blocks, forward, backward[0] if backward else None, list(self._asked(rows, part)))

    def _computed(self, rows: Rows, part: PartOfStep) -> SideFlops:
        without_edge = part.active if self._span.valued else part.parked - part.active
        left = {site: len(self._matrices[site][0]) for site in without_edge}
        return self._span.passes(rows, self._agreed.keeps, self._agreed.below, part.active, left)

    def _passes(self, rows: Rows, part: PartOfStep, cloud: SideFlops) -> Iterator[Crossing]:
        """The forward, and the backward if one follows."""
        waits, named = bool(part.active), Part(self._bitmap(part.active), bool(part.parked))
        if self._span.valued:
            waits, named = False, Part(b"", bool(part.active))
        yield forward_pass(self._agreed, rows, named, cost_of(int(cloud.forward), at_ports=waits))
        if self._agreed.keeps:
            yield backward_pass(self._agreed, rows, named, cost_of(0, int(cloud.backward), at_ports=waits))

    def _asked(self, rows: Rows, part: PartOfStep) -> Iterator[Asked]:
        if self._span.valued:
            return
        for question in self._span.questions.of(part.active, self._agreed.below):
            yield Asked(question, at_port(self._agreed, rows.tokens, question))

    def values(self, sites: frozenset[Site], parts: int) -> Crossing:
        """The values of a step and their gradients, summed over so many microbatches; none where none cross."""
        if not self._span.valued or not sites:
            return Crossing()
        matrices = [matrix for site in sorted(sites) for matrix in self._matrices[site]]
        return values([tuple(one.shape) for one in matrices], matrices[0].dtype, self._bitmap(sites), parts)

    def left_idle(self, sites: frozenset[Site]) -> Crossing:
        """Leaving the adapters of some ports with the cloud."""
        matrices = [matrix for site in sorted(sites) for matrix in self._matrices[site]]
        dtype = matrices[0].dtype if matrices else torch.float32
        return parked([(len(matrix), matrix.shape[1]) for matrix in matrices], dtype, self._bitmap(sites))

    def _bitmap(self, sites: frozenset[Site]) -> bytes:
        return self._adapters.bitmap(sites) if self._adapters is not None else b""

    def _answered(self, question: PortQuestion, tokens: int) -> SideFlops:
        total = SideFlops()
        for name in question.modules:
            down, up = sizes_of(self._layers[question.block, name])
            if question.backward:
                total += SideFlops(0, span_flops.answer_backward(tokens, down, up, question.wanted))
            else:
                total += SideFlops(span_flops.answer_forward(tokens, down, up))
        return total
