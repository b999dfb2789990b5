"""What using the edge's model costs the edge beside training: scoring rows and continuing texts, by phase.

Knows the edge model, its FLOPs and the ledger; decides nothing of what is run.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from edge_client.edge_model import EdgeModel, device_of
from edge_client.tuning import Tuning
from isthmus.ledger.flops import ModelFlops
from isthmus.ledger.record import Ledger, Phase
from isthmus.training.collate import Batch
from isthmus.training.data import Example
from isthmus.training.scoring import Progress, Scores, score


class Counting:
    """Counts passes of one model that nothing is learnt from."""

    def __init__(self, edge: EdgeModel, tuning: Tuning, ledger: Ledger, flops: Callable[[], ModelFlops]) -> None:
        """Count into `ledger`; `flops` are of the edge's part of the model as it is when asked."""
        self._edge = edge
        self._tuning = tuning
        self._ledger = ledger
        self._flops = flops

    def score(self, phase: Phase, rows: Sequence[Example], batch_size: int, progress: Progress | None = None) -> Scores:
        """Score the model on rows, as `isthmus.training.scoring.score`, and count that under `phase`."""
        flops, waited = self._flops().forward, self._edge.waited_s

        def ran(batch: Batch, seconds: float) -> None:
            nonlocal waited
            now = self._edge.waited_s
            rows, tokens = batch.input_ids_BT.shape
            self._ledger.add(
                phase,
                real_tokens=batch.real_tokens,
                padded_tokens=rows * tokens,
                edge_forward_s=max(0.0, seconds - (now - waited)),
                edge_forward_flops=flops.of(rows, tokens + self._tuning.virtual_tokens, outputs=batch.counted),
            )
            waited = now

        with self._edge.phase(phase):
            return score(self._tuning.model, rows, batch_size, device_of(self._edge), progress, ran)

    @contextmanager
    def continuing(self, phase: Phase) -> Iterator[None]:
        """Count what texts cost that are continued in here: each call by its shape and what is kept of those before."""
        flops = self._flops().forward

        def called(_: Any, __: Any, passed: dict[str, Any]) -> None:
            given = passed.get("input_ids") if passed.get("inputs_embeds") is None else passed["inputs_embeds"]
            if given is not None:
                kept = passed.get("past_key_values")
                context = given.shape[1] + (kept.get_seq_length() if kept is not None else 0)
                shape = given.shape[0], given.shape[1], context
                spent = flops.of(*shape, outputs=given.shape[0])
                if kept is not None and self._edge.outputs is not None:  # the blocks below the span run too
                    spent += self._edge.outputs.flops_below.of(*shape)
                self._ledger.add(phase, edge_forward_flops=spent)

        began, waited = time.perf_counter(), self._edge.waited_s
        hook = self._tuning.base.register_forward_pre_hook(called, with_kwargs=True)
        try:
            with self._edge.phase(phase):
                yield
        finally:
            hook.remove()
            spent_s = time.perf_counter() - began - (self._edge.waited_s - waited)
            self._ledger.add(phase, edge_forward_s=max(0.0, spent_s))
