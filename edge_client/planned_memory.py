"""Peak live tensors of both sides of a run that is only planned.

Knows an edge on the meta device, what trains on it, and the span; opens no line. What runs measure is counted by the
class that measures them, on tensors without values.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from edge_client.absent_span import stand_in
from edge_client.config import TrainConfig
from edge_client.dropout import Draw, drawing
from edge_client.edge_model import answers_where_wanted
from edge_client.placed import PlacedEdge
from edge_client.port_adapters import added_by, inputs_of
from edge_client.taking_part import name_of, policy_of
from isthmus.ledger.flops import on_meta
from isthmus.ledger.memory import TensorPeak
from isthmus.linears import Site
from isthmus.planning.memory import Keeping, route_as_told
from isthmus.planning.span_memory import SpanMemory
from isthmus.planning.workload import Workload
from isthmus.rows import Rows
from isthmus.training.batches import split_rows
from isthmus.training.optimizer import Optimizer
from isthmus.training.outputs import wanting


@dataclass(frozen=True)
class Peaks:
    """Live tensors at their most, in bytes: weights, what trains, and what waits for a backward."""

    edge: int
    cloud: int


@dataclass(frozen=True)
class Kept:
    """What one microbatch keeps on the edge, in bytes.

    Attributes:
        waiting: while it waits for the span: of what runs below, and of adapters in the span.
        above: from the span's answer on, until its backward is through there.
        wants_below: the span is asked for the gradient of what it was sent.
    """

    waiting: int
    above: int
    wants_below: bool


class PlannedMemory:
    """Peaks of runs that have one placement and differ in their rows."""

    def __init__(self, placed: PlacedEdge, settings: TrainConfig, span: SpanMemory | None, steps: int = 1) -> None:
        """Plan for a placed edge.

        Args:
            placed: the edge.
            settings: of the run.
            span: what the cloud holds. None: nobody serves.
            steps: of the run.
        """
        self._settings, self._found, self._tuning = settings, placed.edge.found, placed.tuning
        self._adapters = placed.edge.adapters
        self._topmost = answers_where_wanted(placed.cut, self._found)
        self._span = span
        self._sites = self._taking_part(steps)
        self._resident = self._resident_bytes()
        self._model: Any = on_meta(placed.tuning.model)
        route_as_told(self._model)
        self._sends = stand_in(self._model, self._found, bool(self._sites))
        self._counted: dict[tuple[tuple[int, ...], ...], Kept] = {}

    def changed(self, settings: TrainConfig, steps: int) -> "PlannedMemory":
        """The same with other settings that leave what stands where, and what trains, as it is."""
        twin = copy(self)
        twin._settings = settings
        twin._sites = twin._taking_part(steps)
        if twin._sites != self._sites:
            twin._counted = {}
        return twin

    def peaks(self, workload: Workload) -> Peaks:
        """The peaks of a run whose batches are like this one."""
        parts = _parts(workload, self._settings.microbatches)
        kept = [self._kept(rows) for rows in parts]
        return Peaks(self._resident + self._together(kept), self._on_the_cloud(parts, kept))

    @staticmethod
    def _together(kept: Sequence[Kept]) -> int:
        """What microbatches keep at once: all of them wait for the span while one is above it."""
        return sum(one.waiting for one in kept) + max(one.above for one in kept)

    def _on_the_cloud(self, parts: Sequence[Rows], kept: Sequence[Kept]) -> int:
        if self._span is None:
            return 0
        span, graphs = self._span, 0
        for rows, one in zip(parts, kept, strict=True):
            if self._sends is not None and (one.wants_below or self._sites):
                graphs += span.graph_bytes(self._sent(rows), one.wants_below, self._sites)
        return span.weight_bytes + graphs

    def _resident_bytes(self) -> int:
        """As `edge_client.step.Stepper` and `edge_client.train` have it."""
        trainable = self._tuning.trainable
        memory = TensorPeak(self._tuning.model)
        memory.hold("gradients", sum(parameter.nbytes for parameter in trainable.values()))
        memory.hold("optimizer", Optimizer(trainable, self._settings.clip_norm).state_bytes)
        return memory.resident_bytes

    def _taking_part(self, steps: int) -> tuple[Site, ...]:
        """The ports that take part in the first step: in a warm-up all do, and never more than then."""
        if self._adapters is None or self._settings.kr_active is None:
            return self._adapters.sites if self._adapters is not None else ()
        policy = policy_of(self._settings, self._adapters, steps)
        policy.decide(0)
        active = policy.active(0)
        return tuple(site for site in self._adapters.sites if name_of(site) in active)

    def _kept(self, rows: Rows) -> Kept:
        key = rows.lengths, tuple(rows.apart()[1])
        if key not in self._counted:
            self._counted[key] = self._count(rows)
        return self._counted[key]

    def _count(self, rows: Rows) -> Kept:
        keeping, before, below = Keeping(self._model), 0, False

        def arriving(wants_below: bool) -> None:
            nonlocal before, below
            before, below = keeping.kept_bytes, wants_below

        if self._sends is not None:
            self._sends.rows, self._sends.arriving = self._sent(rows), arriving
        with keeping.counting(rows.mask() is not None):
            loss = self._loss(rows)
        kept = keeping.kept_bytes
        del loss  # which has held the graph
        return Kept(before + self._at_ports(rows), kept - before, below)

    def _sent(self, rows: Rows) -> Rows:
        """What the span is asked for: with a prompt's tokens, and for what is wanted where no block is above."""
        more, wanted_N = self._tuning.virtual_tokens, None
        if self._topmost and rows.wanted_N is not None:
            each = torch.split(rows.wanted_N, list(rows.lengths))
            wanted_N = torch.cat([nn.functional.pad(wanted, (more, 0)) for wanted in each])
        return Rows(tuple(length + more for length in rows.lengths), rows.starts, wanted_N)

    def _loss(self, rows: Rows) -> torch.Tensor:
        """As `isthmus.training.collate.summed_loss`, of rows without content."""
        shape, index_N = (len(rows.lengths), rows.longest), rows.index()
        wanted_BT = torch.zeros(shape, dtype=torch.bool)
        wanted_BT.view(-1)[index_N] = True if rows.wanted_N is None else rows.wanted_N
        whole_BT = torch.empty(shape, dtype=torch.long, device="meta")
        given: dict[str, torch.Tensor] = {"input_ids": whole_BT}
        if self._settings.forward_only:  # by its ids a row's outputs would be looked up
            weight = self._tuning.base.get_input_embeddings().weight
            given = {"inputs_embeds": weight.new_empty(*shape, weight.shape[1])}
        draw = Draw(0, 0, 0, None if rows.mask() is None else index_N, wanted_BT.numel())
        with wanting(wanted_BT), drawing(draw):
            logits = self._model(**given, attention_mask=whole_BT, use_cache=False).logits
        logits_KV = (logits if logits.dim() == 2 else logits[0]).float()
        targets_K = torch.empty(len(logits_KV), dtype=torch.long, device="meta")
        return cross_entropy(logits_KV, targets_K, reduction="sum")

    def _at_ports(self, rows: Rows) -> int:
        """What adapters in the span keep of what they were asked."""
        if self._adapters is None or self._span is None:
            return 0
        groups: dict[tuple[Site, ...], int] = {}
        for site in self._sites:
            shared = [(site[0], name) for name in self._adapters.linears[site].shared]
            sites = tuple(one for one in shared if one in self._sites)
            groups[sites] = groups.get(sites) or self._at_group(sites, rows, self._span.dtype)
        return sum(groups.values())

    def _at_group(self, sites: tuple[Site, ...], rows: Rows, dtype: torch.dtype) -> int:
        layers = [self._adapters.layers[site] for site in sites] if self._adapters is not None else []
        came = [
            torch.empty(rows.tokens, width, dtype=dtype, device="meta", requires_grad=True)
            for width in inputs_of(layers)
        ]
        keeping = Keeping(nn.ModuleList(layers))
        with keeping.counting(False), drawing(Draw(0, 0, 0, None, rows.tokens)):
            added = [added_by(layer, came[min(number, len(came) - 1)]) for number, layer in enumerate(layers)]
        kept = keeping.kept_bytes
        del added
        return kept


def _parts(workload: Workload, microbatches: int) -> list[Rows]:
    """A batch's microbatches; what carries loss stands at the end of each row."""
    parts = []
    for numbers in split_rows(list(range(len(workload.lengths))), microbatches):
        lengths = tuple(workload.lengths[number] for number in numbers)
        wanted = [torch.arange(workload.lengths[n]) >= workload.lengths[n] - workload.losses[n] for n in numbers]
        parts.append(Rows(lengths, (0,) * len(lengths), torch.cat(wanted)))
    return parts
