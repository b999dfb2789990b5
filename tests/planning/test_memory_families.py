"""What one pass of a whole model keeps for its backward is planned to the byte, whatever the family and its masks."""

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTJConfig,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from edge_client.attaching import attach
from edge_client.config import TrainConfig
from edge_client.placed import place_edge
from edge_client.planned_memory import PlannedMemory
from isthmus.architectures import class_of
from isthmus.blocks import find_blocks
from isthmus.cut import Cut
from isthmus.ledger.memory import TensorPeak
from isthmus.planning.workload import Workload
from isthmus.training.collate import Batch, summed_loss
from isthmus.training.data import TokenSequence
from isthmus.training.optimizer import Optimizer
from isthmus.training.outputs import select_outputs

IDS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, **IDS}
WHOLE = {**SHAPE, "intermediate_size": 128, "max_position_embeddings": 256}
GROUPED = {**WHOLE, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "sliding_window": 32}
CONFIGURATIONS: dict[str, PreTrainedConfig] = {
    "mistral": MistralConfig(**WINDOW),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": Gemma2Config(**WINDOW, head_dim=16),
    "gemma3": Gemma3TextConfig(**WINDOW, head_dim=16),
    "opt": OPTConfig(**SHAPE, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=256),
    "gpt-neox": GPTNeoXConfig(**WHOLE),
    "gpt-j": GPTJConfig(**IDS, n_embd=64, n_layer=4, n_head=4, rotary_dim=16, n_positions=256),
    "bloom": BloomConfig(**IDS, hidden_size=64, n_layer=4, n_head=4),
    "falcon": FalconConfig(**SHAPE),
    "phi": PhiConfig(**WHOLE),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
}
LENGTHS = {"even": (64, 64, 64), "ragged": (64, 40, 20)}
SETTINGS = TrainConfig.model_validate({"method": "local", "model": "m", "data": "d", "cut": "1:1", "peft": "lora"})


def measured(configuration: PreTrainedConfig, lengths: tuple[int, ...]) -> int:
    """The peak of a real forward, counted as a run counts it."""
    model = class_of(configuration)._from_config(configuration).requires_grad_(False).eval()
    found = find_blocks(model)
    select_outputs(model)
    tuning = attach(model, found, Cut.parse("1:1"), SETTINGS.placement)
    memory = TensorPeak(tuning.model)
    memory.hold("gradients", sum(parameter.nbytes for parameter in tuning.trainable.values()))
    memory.hold("optimizer", Optimizer(tuning.trainable, 1.0).state_bytes)
    rows = [TokenSequence(tuple(range(3, 4 + length)), (False, *[True] * length)) for length in lengths]
    with memory.saving():
        loss = summed_loss(tuning.model, Batch.of(rows), torch.device("cpu"))
    assert loss.requires_grad
    return memory.peak_bytes


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_a_pass_keeps_what_was_planned(family: str, rows: str) -> None:
    configuration, lengths = CONFIGURATIONS[family], LENGTHS[rows]
    plan = PlannedMemory(place_edge(SETTINGS, configuration), SETTINGS, None)
    assert plan.peaks(Workload(lengths, lengths)).edge == measured(configuration, lengths)
