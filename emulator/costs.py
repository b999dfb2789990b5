"""What building an emulator costs its owner, stage by stage: its forms are filled, it is distilled, it is measured.

Knows a pair's FLOPs, seconds, memory and the ledger; decides nothing of what is built. Of filling forms the passes
through the model and the products of their inputs count as FLOPs, but no factorisation: that depends on values.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import DynamicCache

from emulator.pair import Pair
from isthmus.ledger import told
from isthmus.ledger.flops import ModelFlops, count, on_meta
from isthmus.ledger.memory import TensorPeak, peak_bytes, reset_peak
from isthmus.ledger.record import Ledger, Phase
from isthmus.ledger.told import Told
from isthmus.training.collate import Batch
from isthmus.training.outputs import wanting

NAME: Final = "costs.jsonl"
"""Of the ledger beside the checkpoints of a distillation."""


class Costs:
    """Counts a build; `memory` is of both models' tensors."""

    def __init__(self, pair: Pair) -> None:
        """Begin at nothing, in memory alone."""
        self.ledger = Ledger()
        self.memory = TensorPeak(pair.model, pair.twin)
        self._pair = pair
        self._stages: list[Phase] = []
        self._steps = 0
        self._file: Path | None = None
        self._uncounted: list[Callable[[], None]] = []  # FLOPs: counting a model takes a while, and not all are asked

    def keep_in(self, folder: Path) -> None:
        """Go on in a folder's ledger, where an interrupted build has left what it spent: that stays spent.

        Raises:
            RunError: it is malformed, or cannot be written.
        """
        self._count()
        self._file = folder / NAME
        kept = Ledger.resume(self._file) if self._file.exists() else Ledger(self._file)
        for phase in told.OWNERS:
            kept.add(phase, at=None, **self.ledger.totals(phase))
            for name, value in self.ledger.peaks(phase).items():
                kept.peak(name, value, phase)
        kept.close_step(0)
        self.ledger = kept

    @contextmanager
    def stage(self, phase: Phase) -> Iterator[None]:
        """In here memory is this stage's, whichever stage it is in."""
        self._settle()
        self._stages.append(phase)
        try:
            yield
        finally:
            self._settle()
            self._stages.pop()

    @contextmanager
    def seconds(self, phase: Phase, figure: str) -> Iterator[None]:
        """Count the seconds in here."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.ledger.add(phase, at=None, **{figure: time.perf_counter() - began})

    def compared(self, phase: Phase, batch: Batch, both_heads: bool = False, backward: bool = False) -> None:
        """Count a batch that both models have seen, and with `backward` the emulator's gradients too."""
        rows, tokens = batch.input_ids_BT.shape

        def count() -> None:
            spent = self._model.forward.of(rows, tokens, outputs=batch.counted if both_heads else 0)
            spent += self._twin.forward.of(rows, tokens, outputs=batch.counted)
            gradients = self._twin.backward.of(rows, tokens, outputs=batch.counted) if backward else 0
            self.ledger.add(phase, cloud_forward_flops=spent, cloud_backward_flops=gradients)

        self._uncounted.append(count)

    def looked_at(self, batch: Batch, widths: tuple[int, ...]) -> None:
        """Count a batch through the model, and x xᵀ over its tokens for inputs of these widths, to fill forms."""
        rows, tokens = batch.input_ids_BT.shape
        products = 2 * batch.real_tokens * sum(width**2 for width in widths)

        def count() -> None:
            self.ledger.add("build", cloud_forward_flops=self._model.forward.of(rows, tokens) + products)

        self._uncounted.append(count)

    def close_step(self, step: int) -> None:
        """Write what a step of the distillation cost."""
        self._steps = step
        self._settle()
        if self._file is not None:
            self._count()
            self.ledger.close_step(step)

    def told(self, of: str, stored_bytes: int) -> Told:
        """All of it, of a bundle with this id."""
        self._count()
        return Told(of, stored_bytes, self.ledger, {"distil": self._steps} if self._steps else {})

    def save(self, out: Path, of: str, stored_bytes: int) -> None:
        """Write the record beside the folder `out`: each step of a distillation, and each other stage, on a line.

        Raises:
            OSError: it cannot be written.
        """
        self._count()
        self.ledger.close_step(self._steps)
        lines = self._file.read_text().splitlines() if self._file else self.told(of, stored_bytes).lines()[1:]
        told.write(told.beside(out), of, stored_bytes, lines)

    def _count(self) -> None:
        while self._uncounted:
            self._uncounted.pop()()

    def _settle(self) -> None:
        """Give the stage under way what memory rose to, and let it rise anew."""
        if self._stages:
            self.ledger.peak("cloud_peak_memory_bytes", peak_bytes() or 0, self._stages[-1])
            self.ledger.peak("cloud_peak_tensor_bytes", self.memory.peak_bytes, self._stages[-1])
        reset_peak()
        self.memory.begin_anew()

    @cached_property
    def _model(self) -> ModelFlops:
        return passes_of(self._pair.model, frozenset())

    @cached_property
    def _twin(self) -> ModelFlops:
        """Asked for once the forms are filled and the repeated blocks put in."""
        return passes_of(self._pair.twin, frozenset(self._pair.recipe.kept))


def passes_of(model: Any, training: frozenset[int]) -> ModelFlops:
    """Both passes of a language model in which the parameters of these blocks train."""
    bare: Any = on_meta(model)
    bare.requires_grad_(False)
    for blocks in [module for module in bare.modules() if isinstance(module, nn.ModuleList)]:
        for number in training & set(range(len(blocks))):
            for parameter in blocks[number].parameters():
                parameter.requires_grad_(parameter.is_floating_point())
    size = model.config.get_text_config().hidden_size

    def run(tokens: int, outputs: int) -> torch.Tensor:
        embeds_BTD = torch.empty(1, tokens, size, device="meta", dtype=model.dtype)
        with wanting((torch.arange(tokens) < outputs)[None]):
            # Without a cache Hugging Face looks at masks by value, which meta tensors lack.
            logits: torch.Tensor = bare(inputs_embeds=embeds_BTD, past_key_values=DynamicCache(), use_cache=True).logits
        return logits

    with torch.enable_grad():
        return count(run)
