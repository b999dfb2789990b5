"""A synthetic Llama that is deep and narrow, so that its ends are small beside the whole; made in seconds.

Knows one random block, which stands at every depth: what is learnt means nothing, but every value takes its place.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedConfig

from tests.harness import byte_tokenizer, tiny_config

BLOCKS, HIDDEN, INTERMEDIATE = 48, 768, 3072
STORED = torch.bfloat16


def config(blocks: int = BLOCKS) -> PreTrainedConfig:
    """Of the model; a block holds 9.0 million weights."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": 12}
    return tiny_config("llama", num_hidden_layers=blocks, num_key_value_heads=12, **sizes)


def save(directory: Path, blocks: int = BLOCKS) -> int:
    """Save the model and a tokenizer; returns how many weights it has."""
    torch.manual_seed(0)
    settings = config(blocks)
    settings.dtype = STORED
    one = LlamaForCausalLM(config(1)).to(STORED).state_dict()
    repeated = {}
    for name, tensor in one.items():
        names = [name.replace("layers.0.", f"layers.{block}.") for block in range(blocks)]
        repeated |= {each: tensor.clone() for each in dict.fromkeys(names)}
    directory.mkdir()
    save_file(repeated, directory / "model.safetensors", {"format": "pt"})
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return sum(tensor.numel() for tensor in repeated.values())
