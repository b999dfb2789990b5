"""The step that is measured: one batch, one optimizer step, on an edge model whose span may be anywhere.

Knows the edge's own pieces; times nothing.
"""

from pathlib import Path
from typing import Any

import torch

from benchmarks.place import CUT, ROWS, TOKENS
from edge_client.assemble import connect, load_local
from edge_client.attaching import Placement, attach
from edge_client.config import TrainConfig
from edge_client.edge_flops import count_edge_flops
from edge_client.edge_model import EdgeModel
from edge_client.step import Stepper
from isthmus.ledger.record import Ledger
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from isthmus.training.optimizer import Optimizer

RANK = 8


def settings(**changes: Any) -> TrainConfig:
    """A run's settings, as far as they make an edge model; the data file is never read here."""
    return TrainConfig(cut=CUT, data=Path("unread.jsonl"), **changes)


def build(config: TrainConfig, ledger: Ledger) -> EdgeModel:
    """The edge model that `config` describes."""
    return load_local(config) if config.method == "local" else connect(config, ledger, lambda *_: None)


def full_batch(vocabulary: int) -> Batch:
    """8 rows of 128 random real tokens each; as in the review data, the loss is on the last one alone."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocabulary, (ROWS, TOKENS + 1), generator=generator).tolist()
    counted = (*(False,) * TOKENS, True)
    return Batch.of([TokenSequence(tuple(ids), counted) for ids in ids_BT])


class Steps:
    """Training steps on one and the same batch."""

    def __init__(self, edge: EdgeModel, ledger: Ledger) -> None:
        """Attach LoRA and an optimizer to `edge`."""
        tuning = attach(edge.model, edge.found, edge.cut, Placement("lora", RANK, 2.0 * RANK, None, 0))
        self.parameters = sum(parameter.numel() for parameter in tuning.model.parameters())
        self._optimizer = Optimizer(tuning.trainable, 1.0)
        self._stepper = Stepper(edge, tuning, ledger, count_edge_flops(edge, tuning), 1)
        self._stepper.memory.hold("optimizer", self._optimizer.state_bytes)
        self._batch = full_batch(edge.model.config.vocab_size)

    def step(self) -> None:
        """Forward, backward, update."""
        found = self._stepper.gradients([self._batch])
        self._optimizer.step(found.by_name, 1e-4)

    @property
    def peak_tensor_bytes(self) -> int:
        """Weights, gradients and what autograd saved, at their most."""
        return self._stepper.memory.peak_bytes
