"""One training step: gradients of a whole batch from its microbatches, several in flight at once.

Knows a model to call, its trainable parameters and the ledger; knows no data files, no schedule and no span.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from edge_client.dropout import Draw, drawing
from edge_client.edge_model import EdgeModel, device_of
from edge_client.span_values import SpanValues
from edge_client.tuning import Tuning
from edge_client.turns import Turns
from isthmus.ledger.flops import ModelFlops
from isthmus.ledger.memory import TensorPeak
from isthmus.ledger.record import Ledger
from isthmus.training.collate import Batch, summed_loss


@dataclass(frozen=True)
class Gradients:
    """Mean loss of a batch in nats per counted token, with what the method adds, and its gradient by parameter name."""

    loss: float
    by_name: dict[str, torch.Tensor]


class Stepper:
    """Computes gradients and counts what that cost the edge."""

    def __init__(
        self, edge: EdgeModel, tuning: Tuning, ledger: Ledger, flops: ModelFlops, microbatches: int, seed: int = 0
    ) -> None:
        """Run up to `microbatches` at once; `seed` is of dropout's masks."""
        self._edge = edge
        self._tuning = tuning
        self._ledger = ledger
        self._flops = flops
        self._pool = ThreadPoolExecutor(microbatches, thread_name_prefix="microbatch")
        self._device = device_of(edge)
        self.memory = TensorPeak(tuning.model)
        self.memory.hold("gradients", sum(parameter.nbytes for parameter in tuning.trainable.values()))
        self._seed = seed
        self._turns = Turns()
        if edge.remote is not None:
            edge.remote.turns = self._turns
        if edge.adapters is not None:
            edge.adapters.memory = self.memory

    def gradients(
        self, batches: Sequence[Batch], step: int = 0, wanted: Mapping[str, nn.Parameter] | None = None
    ) -> Gradients:
        """Gradients of the mean loss over all microbatches, summed in their order whatever finishes first.

        Args:
            batches: the microbatches.
            step: of the run, from 0; dropout's masks depend on it.
            wanted: the parameters, by name; all that train where it is left out.
        """
        if self._edge.remote is not None:
            self._edge.remote.step = step + 1
        counted = sum(batch.counted for batch in batches)
        wanted = self._tuning.trainable if wanted is None else wanted
        span = self._edge.adapters if isinstance(self._edge.adapters, SpanValues) else None
        asked: list[torch.Tensor] = list(wanted.values())
        if span is not None:
            asked = span.here(list(wanted.values()))
            span.leave()
        draws = [self._draw(batch, step, part) for part, batch in enumerate(batches)]
        parts = list(self._pool.map(lambda batch, draw: self._part(batch, counted, draw, asked), batches, draws))
        total = parts[0][1]
        for _, part in parts[1:]:
            total = [sum_ + gradient for sum_, gradient in zip(total, part, strict=True)]
        loss = sum(loss for loss, _ in parts)
        penalty = self._tuning.penalty()
        if penalty is not None:
            loss += float(penalty.detach())
            added = torch.autograd.grad(penalty, asked, materialize_grads=True)
            total = [sum_ + gradient for sum_, gradient in zip(total, added, strict=True)]
        found = {id(one): gradient for one, gradient in zip(asked, total, strict=True)}
        if span is not None:
            found |= span.gather()
        return Gradients(loss, {name: found[id(parameter)] for name, parameter in wanted.items()})

    def close(self) -> None:
        """Free the threads; one that still waits for the cloud ends with the line."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _draw(self, batch: Batch, step: int, part: int) -> Draw:
        flat = batch.attention_mask_BT.reshape(-1)
        index_N = None if bool(flat.all()) else flat.nonzero()[:, 0]
        return Draw(self._seed, step, part, index_N, flat.numel())

    def _part(
        self, batch: Batch, counted: int, draw: Draw, wanted: list[torch.Tensor]
    ) -> tuple[float, list[torch.Tensor]]:
        with self._turns.taken():
            began, waited = time.perf_counter(), self._edge.waited_s
            with self.memory.saving(), drawing(draw):
                loss = summed_loss(self._tuning.model, batch, self._device) / counted
            middle, waited_forward = time.perf_counter(), self._edge.waited_s
            # A backward that waits for the cloud must not hold a device's only autograd thread.
            with torch.autograd.set_multithreading_enabled(False):
                gradients = torch.autograd.grad(loss, wanted)
            ended, waited_both = time.perf_counter(), self._edge.waited_s
        rows, tokens = batch.input_ids_BT.shape
        run = tokens + self._tuning.virtual_tokens
        self._ledger.add(
            "train",
            real_tokens=batch.real_tokens,
            padded_tokens=rows * tokens,
            edge_forward_s=max(0.0, middle - began - (waited_forward - waited)),
            edge_backward_s=max(0.0, ended - middle - (waited_both - waited_forward)),
            edge_forward_flops=self._flops.forward.of(rows, run, outputs=batch.counted),
            edge_backward_flops=self._flops.backward.of(rows, run, outputs=batch.counted),
        )
        return float(loss.detach()), list(gradients)
