"""What one microbatch will move between both sides, and what the cloud and its ports will compute for it.

Knows what is placed where, what a session agrees on, and rows; knows no schedule and no links.
"""

from dataclasses import dataclass

import torch

from edge_client.alive import PartOfStep
from edge_client.cached import requests_of
from edge_client.config import TrainConfig
from edge_client.edge_flops import trains_below
from edge_client.edge_model import answers_where_wanted
from edge_client.placed import PlacedEdge
from edge_client.port_adapters import matrices_of
from isthmus.ledger import span_flops
from isthmus.linears import Site
from isthmus.planning.cloud import PlannedSpan
from isthmus.planning.crossing import Agreed, Part, apart, at_port, both_passes, parked
from isthmus.planning.figures import Crossing, SideFlops, Step
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
        layers = self._adapters.layers if self._adapters is not None else {}
        self._matrices = {site: matrices_of(layer) for site, layer in layers.items()}
        below = not settings.forward_only and trains_below(placed.edge, placed.tuning)
        self._agreed = Agreed(
            hidden_size=span.hidden_size,
            edge_dtype=placed.edge.model.dtype,
            span_dtype=span.dtype,
            activation=settings.codec,
            gradient=settings.gradient_codec,
            port=settings.port_codec,
            keeps=below or span.answers_ports,
            below=below,
            taps=span.taps,
            answers_ports=span.answers_ports,
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
        agreed, rows = self._agreed, batch.rows(self._topmost)
        left = {site: len(self._matrices[site][0]) for site in part.parked - part.active}
        cloud = self._span.passes(rows, agreed.keeps, agreed.below, part.active, left)
        waits = bool(part.active)
        said = cost_of(int(cloud.forward), at_ports=waits), cost_of(0, int(cloud.backward), at_ports=waits)
        named = Part(self._bitmap(part.active), bool(part.parked))
        total = Step(both_passes(agreed, rows, named, *said), cloud=cloud)
        for question in self._span.questions.of(part.active, agreed.below):
            total += Step(at_port(agreed, rows.tokens, question), self._answered(question, rows.tokens))
        return total

    def at_ports(self) -> tuple[int, int]:
        """Values a token that go down, and up, in a forward with all ports; alike where there are none."""
        asked = [each for each in self._span.questions.of(frozenset(self._matrices), below=True) if not each.backward]
        return sum(sum(each.sent) for each in asked) or 1, sum(sum(each.due) for each in asked) or 1

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
            down, up = (matrix.numel() for matrix in self._matrices[question.block, name])
            if question.backward:
                total += SideFlops(0, span_flops.answer_backward(tokens, down, up, question.wanted))
            else:
                total += SideFlops(span_flops.answer_forward(tokens, down, up))
        return total
