"""Values that cross once a step go to the stages that have their modules, and gradients come back from all of them."""

from pathlib import Path

import pytest

from tests.dlora.reference import every_block, gradients, same_bits
from tests.harness import Server
from tests.parameters.test_parity import with_values
from tests.parity.reference import plain_lora, ragged_sequences, random_values, whole_model
from tests.parity.test_training import LENGTHS, assert_same, plain_gradients


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_and_every_gradient_equal_those_of_plain_peft_in_stages_too(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str
) -> None:
    sequences = ragged_sequences(LENGTHS)
    for cut in ("1:1", "0:2"):
        with with_values(servers[family], cut) as (edge, tuning):
            tuning.load(random_values(tuning.trainable))
            whole = plain_lora(whole_model(tiny_models[family]), family, every_block(family), tuning.values())
            found = gradients(edge, tuning, sequences, 3)
            assert_same(found, plain_gradients(whole, sequences))
            assert same_bits(found, gradients(edge, tuning, sequences, 3))
