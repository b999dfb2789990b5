"""What plugging in and scoring cost the model's owner, for a record beside the plugged-in model.

Knows stages, seconds, memory and FLOPs of scoring; plugs nothing in and scores nothing.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from emulator.costs import passes_of
from isthmus.adapter_files import OWN_WEIGHTS, PEFT_WEIGHTS
from isthmus.errors import RunError
from isthmus.ledger import told
from isthmus.ledger.memory import peak_bytes, reset_peak
from isthmus.ledger.record import Ledger, Phase
from isthmus.ledger.told import Told
from isthmus.training.collate import Batch
from isthmus.training.scoring import Ran


class PluggingCosts:
    """Counts one command."""

    def __init__(self) -> None:
        self._ledger = Ledger()

    @contextmanager
    def plugging_in(self) -> Iterator[None]:
        """In here ends are plugged in."""
        began = time.perf_counter()
        with self._remembering("plug-in"):
            yield
        self._ledger.add("plug-in", cloud_update_s=time.perf_counter() - began)

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[Ran]:
        """In here a model is scored; what is given is to be called with each batch."""
        flops = passes_of(model, frozenset()).forward

        def ran(batch: Batch, seconds: float) -> None:
            rows, tokens = batch.input_ids_BT.shape
            spent = flops.of(rows, tokens, outputs=batch.counted)
            self._ledger.add("score", cloud_forward_s=seconds, cloud_forward_flops=spent)

        with self._remembering("score"):
            yield ran

    def save(self, out: Path, adapter: Path) -> None:
        """Write the record beside the model's folder; it is of the adapter whose tensors the folder `adapter` holds.

        Raises:
            RunError: it cannot be written.
        """
        stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        record = Told(_digest(adapter), stored, self._ledger, {})
        try:
            told.write(told.beside(out), record.of, stored, record.lines()[1:])
        except OSError as error:
            place, why = told.beside(out), error.strerror
            raise RunError(f"{place} cannot be written ({why}); the model stands in {out} all the same") from None

    @contextmanager
    def _remembering(self, phase: Phase) -> Iterator[None]:
        reset_peak()
        try:
            yield
        finally:
            self._ledger.peak("cloud_peak_memory_bytes", peak_bytes() or 0, phase)


def _digest(adapter: Path) -> str:
    """SHA-256 of the tensors' file, as an edge's report names its adapter."""
    (found,) = [adapter / name for name in (PEFT_WEIGHTS, OWN_WEIGHTS) if (adapter / name).is_file()][:1]
    with found.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
