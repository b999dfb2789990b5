"""The models that papers count in: those whose configurations the planner has, and their kin. None has weights."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

import isthmus.planning

SHIPPED = Path(isthmus.planning.__file__).parent / "configurations"

XL = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 64}
"""What version 1.1 of T5 has, which prompt tuning was shown on; others here are of version 1."""

KIN: dict[str, tuple[str, dict[str, Any]]] = {
    "T5-XL": ("T5-3B", {**XL, "d_model": 2048, "d_ff": 5120, "num_heads": 32}),
    "T5-XXL": ("T5-3B", {**XL, "d_model": 4096, "d_ff": 10240, "num_heads": 64}),
    "LLaMA-30B": (
        "LLaMA-7B",
        {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60}
        | {"num_attention_heads": 52, "num_key_value_heads": 52},
    ),
    "LLaMA-65B": (
        "LLaMA-7B",
        {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80}
        | {"num_attention_heads": 64, "num_key_value_heads": 64},
    ),
}
"""Models whose configurations are another's, but for these sizes."""

KINDS: dict[str, Any] = {
    "roberta": AutoModelForSequenceClassification,
    "t5": AutoModelForSeq2SeqLM,
    "llama": AutoModelForCausalLM,
}


def configuration(model: str) -> PreTrainedConfig:
    name, sizes = KIN.get(model, (model, {}))
    found: PreTrainedConfig = AutoConfig.from_pretrained(SHIPPED / f"{name.lower()}.json", **sizes)
    return found


@cache
def outline(model: str) -> PreTrainedModel:
    """The whole model on the meta device; a RoBERTa with a head for two labels."""
    config = configuration(model)
    with torch.device("meta"):
        built: PreTrainedModel = KINDS[config.model_type].from_config(config)
    return built
