"""Cores between frozen factors of the cloud's modules train as in one process, and R values a token cross each way."""

from pathlib import Path

import pytest
import torch
from torch import nn

from edge_client.assemble import load_local
from edge_client.attaching import attach
from edge_client.config import TrainConfig
from edge_client.tuning import Tuning
from tests.dlora.cores import LINEAR, by_hand, with_cores
from tests.dlora.reference import gradients
from tests.harness import Server
from tests.parity.reference import ALPHA, ragged_sequences, random_values
from tests.parity.test_training import LENGTHS, assert_same, plain_gradients

EVERY = ("llama", "gpt2")


def drawn_by(tuning: Tuning, home: Path, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors of `--init random` at every module, as the local method has them."""
    edge, whole = in_one_process(home, rank, "random")
    assert whole.trainable.keys() == tuning.trainable.keys()
    cores = {
        name.removesuffix(".core.weight"): edge.get_submodule(f"{name.removesuffix('.weight')}")
        for name in whole.trainable
    }
    return {name: (core.get_buffer("down_RI"), core.get_buffer("up_OR")) for name, core in cores.items()}


def in_one_process(home: Path, rank: int, init: str) -> tuple[nn.Module, Tuning]:
    given = {"method": "local", "exchange": "core", "init": init, "rank": rank, "alpha": ALPHA, "targets": [LINEAR]}
    config = TrainConfig.model_validate({**given, "data": "unused", "model": str(home), "cut": "1:1"})
    edge = load_local(config)
    return edge.model, attach(edge.model, edge.found, edge.cut, config.placement)


@pytest.mark.parametrize(
    ("init", "rank", "cut", "microbatches"),
    [
        ("svd", 4, "1:1", 1),
        ("svd", 4, "0:0", 4),
        ("svd", 13, "1:1", 4),
        ("random", 4, "1:1", 4),
        ("random", 3, "0:0", 1),
    ],
)
@pytest.mark.parametrize("family", EVERY)
def test_loss_and_every_cores_gradient_equal_those_of_one_process(
    spans: dict[str, Server], homes: dict[str, Path], family: str, init: str, rank: int, cut: str, microbatches: int
) -> None:
    sequences = ragged_sequences(LENGTHS)
    with with_cores(spans[family], cut, rank, init) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))
        drawn = drawn_by(tuning, homes[family], rank) if init == "random" else None
        whole = by_hand(homes[family], family, rank, tuning.values(), drawn)
        theirs = plain_gradients(whole, sequences)
        assert_same(gradients(edge, tuning, sequences, microbatches), theirs)
        before = plain_gradients(by_hand(homes[family], family, rank, zeros(tuning), drawn), sequences)
        assert abs(before.loss - theirs.loss) > 1e-3 * theirs.loss


def zeros(tuning: Tuning) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in tuning.values().items()}
