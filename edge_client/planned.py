"""What a run costs, from its settings and a model's configuration alone: bytes, round trips and operations.

Knows how a run goes: what is fetched, which microbatches make a step, which steps are alike. Everything is built and
counted by the code that a run uses, on the meta device: no weights, no line, no data.

The cloud is taken to have room for the activations that it is asked to keep: none is computed again. Nothing is taken
to be fetched before, and no two rows of the data to be equal.
"""

from collections.abc import Hashable, Mapping
from copy import copy
from functools import cached_property

import torch
from transformers import PreTrainedConfig

from edge_client.alive import NOBODY, Attendance, PartOfStep, attendance
from edge_client.config import TrainConfig
from edge_client.edge_flops import count_edge_flops
from edge_client.foreseen import Microbatch, OverTheWire
from edge_client.placed import PlacedEdge, place_edge
from edge_client.planned_memory import PlannedMemory
from edge_client.planned_storage import adapter_bytes, cache_bytes, checkpoint_bytes
from isthmus.bundle import Manifest
from isthmus.emulated.recipe import Recipe
from isthmus.load import DTYPES
from isthmus.planning.cloud import PlannedSpan
from isthmus.planning.fetched import WEIGHTS, bundle, fetched, weights_bytes
from isthmus.planning.figures import Costs, Crossing, Leg, SideFlops, Step, Storage, Trained
from isthmus.planning.placed import place_emulated, place_ends
from isthmus.planning.workload import Workload
from isthmus.training.batches import split_rows

Spans = dict[Hashable, PlannedSpan]
"""Spans of one model, by all that they depend on: what trains on the edge is none of it."""

STEPS = 1000
"""Of a run that says neither its steps nor its rows."""


class Planned:
    """A run that is only planned.

    Attributes:
        placed: its edge, on the meta device.
        span: what runs on the cloud, on the meta device; None where nothing does in a step.
        memory: what either side holds.
    """

    def __init__(
        self,
        settings: TrainConfig,
        configuration: PreTrainedConfig,
        span_dtype: str = "float32",
        emulator: Recipe | None = None,
        beside: Mapping[str, int] | None = None,
        spans: Spans | None = None,
    ) -> None:
        """Place both sides and count their passes.

        Args:
            settings: of the run; the cut must be told.
            configuration: of the whole model.
            span_dtype: what the cloud computes in, `float32` or `bfloat16`.
            emulator: what it is made of, for `--method offsite`.
            beside: sizes of the files that a bundle holds beside weights, such as a tokenizer's, by their names; None:
                the configuration alone.
            spans: that other plans of this model have made, and this one may add to.

        Raises:
            CutError, ModelError, BundleError: the model cannot be cut so, or the emulator is another model's.
            UsageError: the settings do not fit the model.
        """
        self.settings = settings
        self.placed: PlacedEdge = place_edge(settings, configuration, settings.steps or STEPS, emulator)
        self.span = self._span(configuration, DTYPES[span_dtype], {} if spans is None else spans)
        self._wire = OverTheWire(settings, self.placed, self.span) if self.span is not None else None
        self._flops = count_edge_flops(self.placed.edge, self.placed.tuning)
        self._bundle = self._bundled(configuration, emulator, beside)

    def changed(self, settings: TrainConfig) -> "Planned":
        """The same with other settings that leave what stands where, and what trains, as it is: codecs, for one."""
        if settings == self.settings:
            return self
        twin = copy(self)
        twin.settings = settings
        twin.memory = self.memory.changed(settings, settings.steps or STEPS)
        twin._wire = OverTheWire(settings, twin.placed, twin.span) if twin.span is not None else None
        return twin

    def costs(self, workload: Workload) -> Costs:
        """What it costs with rows of these lengths.

        Raises:
            UsageError: Kill-and-Revive does not fit the number of steps.
        """
        tuning = self.placed.tuning
        head = tuning.head_count if tuning.new else 0
        once = self.settings.forward_only
        seen = self._attendance(workload)
        peaks = self.memory.peaks(workload)
        return Costs(
            trained=Trained(tuning.count - head, head),
            fetch=fetched(self._bundle) if self._bundle is not None else Crossing(),
            first=self._step(workload, seen, known=False),
            later=self._step(workload, seen, known=once),
            edge_peak_tensor_bytes=peaks.edge,
            cloud_peak_tensor_bytes=peaks.cloud,
            storage=self._storage(workload),
            tensors=len(tuning.trainable),
            legs=self.legs(workload, (seen or NOBODY).usual),
        )

    def legs(self, workload: Workload, part: PartOfStep) -> tuple[Leg, ...]:
        """The way of the first microbatch of a step that has this part; none where nothing crosses in a step."""
        if self._wire is None:
            return ()
        whole = self._batch(workload)
        numbers = split_rows(list(range(len(whole.lengths))), self.settings.microbatches)[0]
        return self._wire.legs(whole.some(numbers), part)

    @cached_property
    def memory(self) -> PlannedMemory:
        """What either side holds."""
        span = self.span.memory if self.span is not None else None
        return PlannedMemory(self.placed, self.settings, span, self.settings.steps or STEPS)

    def _storage(self, workload: Workload) -> Storage:
        settings, dtype = self.settings, self.span.dtype if self.span is not None else torch.float32
        return Storage(
            fetched=self._bundle.total_bytes if self._bundle is not None else 0,
            adapter=adapter_bytes(self.placed, settings),
            checkpoint=checkpoint_bytes(self.placed.tuning),
            cache=cache_bytes(self.placed, settings, workload, self._met(workload.rows), dtype),
        )

    def _met(self, rows: int | None) -> int:
        """Rows of the data that the run sees."""
        if rows is None:
            return (self.settings.steps or STEPS) * self.settings.batch_size
        return min(rows, self.settings.count_steps(rows) * self.settings.batch_size)

    def _batch(self, workload: Workload) -> Microbatch:
        """All its rows, with what a prompt puts in front."""
        virtual = self.placed.tuning.virtual_tokens
        return Microbatch(tuple(length + virtual for length in workload.lengths), workload.losses)

    def _span(self, configuration: PreTrainedConfig, dtype: torch.dtype, spans: Spans) -> PlannedSpan | None:
        if not self.settings.crosses:
            return None
        placed = self.placed
        linears = placed.linears or {}
        key = str(placed.cut), dtype, placed.ports, frozenset(linears)
        if key not in spans:
            spans[key] = PlannedSpan(configuration, placed.cut, dtype, placed.ports, linears)
        return spans[key]

    def _attendance(self, workload: Workload) -> Attendance | None:
        adapters, settings = self.placed.edge.adapters, self.settings
        if adapters is None:
            return None
        told = settings.steps is not None or workload.rows is not None
        return attendance(settings, adapters, settings.count_steps(workload.rows or 1) if told else STEPS)

    def _step(self, workload: Workload, seen: Attendance | None, known: bool) -> Step:
        """One of those steps, on average."""
        whole = self._batch(workload)
        numbers = split_rows(list(range(len(whole.lengths))), self.settings.microbatches)
        total = Step()
        for batch in map(whole.some, numbers):
            total += Step(edge=self._own(batch)) + self._moved(batch, seen, known)
        if seen is not None and self._wire is not None:
            for part, share in seen.parts.items():
                total += Step(self._wire.values(part.active, len(numbers))) * share
            for sites, times in seen.parkings.items():
                total += Step(self._wire.left_idle(sites)) * times
        return total

    def _own(self, batch: Microbatch) -> SideFlops:
        """What the edge computes, but for answers at ports."""
        rows, tokens, outputs = len(batch.lengths), max(batch.lengths), sum(batch.losses)
        forward, backward = self._flops.forward, self._flops.backward
        return SideFlops(forward.of(rows, tokens, outputs=outputs), backward.of(rows, tokens, outputs=outputs))

    def _moved(self, batch: Microbatch, seen: Attendance | None, known: bool) -> Step:
        if self._wire is None or known:
            return Step()
        if self.settings.forward_only:
            return self._wire.asked_once(batch)
        total = Step()
        for part, share in (seen or NOBODY).parts.items():
            total += self._wire.trained(batch, part) * share
        return total

    def _bundled(
        self, configuration: PreTrainedConfig, emulator: Recipe | None, beside: Mapping[str, int] | None
    ) -> Manifest | None:
        """What is fetched; None where no server is spoken to."""
        if self.settings.server is None:
            return None
        cut, stored = self.placed.cut, configuration.dtype or torch.float32
        files = {"config.json": len(configuration.to_json_string())} if beside is None else dict(beside)
        if emulator is None:
            model, _ = place_ends(configuration, cut, stored)
            return bundle("ends", cut, files | {WEIGHTS: weights_bytes(model)})
        model, _ = place_emulated(configuration, emulator, stored)
        return bundle("emulator", cut, files | {WEIGHTS: weights_bytes(model)})
