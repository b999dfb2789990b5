"""`--exchange parameters` over a real server is plain `peft` on the whole model in one process: loss and gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_client.attaching import attach
from edge_client.edge_model import EdgeModel
from edge_client.placement import Placement
from edge_client.tuning import Tuning
from tests.dlora.reference import ALL, every_block, gradients, ports, same_bits
from tests.harness import Server
from tests.parity.reference import ALPHA, RANK, connected, plain_lora, ragged_sequences, random_values, whole_model
from tests.parity.test_training import LENGTHS, assert_five_steps_agree, assert_same, plain_gradients


@contextmanager
def with_values(server: Server, cut: str, seed: int = 0, **settings: object) -> Iterator[tuple[EdgeModel, Tuning]]:
    """An edge with adapters at all linear modules, whose values inside the span cross once a step."""
    told = {"method": "dlora", "exchange": "parameters", "targets": ALL, **settings}
    with connected(server, cut, **told) as edge:
        tuning = attach(edge.model, edge.found, edge.cut, Placement("lora", RANK, ALPHA, ALL, seed, in_span=True))
        ports(edge).attached()
        yield edge, tuning


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("cut", ["1:1", "0:0"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_and_every_gradient_equal_those_of_plain_peft_on_all_linear_modules(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str, cut: str, microbatches: int
) -> None:
    sequences = ragged_sequences(LENGTHS)
    with with_values(servers[family], cut) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))
        whole = plain_lora(whole_model(tiny_models[family]), family, every_block(family), tuning.values())
        found = gradients(edge, tuning, sequences, microbatches)
        assert_same(found, plain_gradients(whole, sequences))
        assert same_bits(found, gradients(edge, tuning, sequences, microbatches))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_five_steps_of_adamw_make_the_adapter_of_plain_peft(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str
) -> None:
    with with_values(servers[family], "1:1") as (edge, tuning):
        whole = plain_lora(whole_model(tiny_models[family]), family, every_block(family), tuning.values())
        assert_five_steps_agree(edge, tuning, whole, 3)
