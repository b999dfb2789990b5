"""Tiny random models of whatever family is asked for, from nothing but its configuration's own names of sizes."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

BLOCKS = 4
WIDE, NARROW = 32, 8
LARGEST = 4_000_000
"""Parameters of what is still tiny."""

WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim")
INNER = ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size")
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_experts", "num_local_experts")
HEAD_WIDTHS = ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
IDS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "max_position_embeddings": 64,
    "n_positions": 64,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "rotary_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}


def tiny_configuration(family: str) -> PreTrainedConfig | None:
    """A configuration of `BLOCKS` blocks; None where that takes more than setting sizes."""
    kind = CONFIG_MAPPING[family]
    try:
        default = kind()
        config = kind(**_sizes(kind, default))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # noqa: BLE001 (whatever a family's own code makes of sizes that it did not expect)
        return None
    return config if sum(parameter.numel() for parameter in model.parameters()) < LARGEST else None


def _sizes(kind: type[PreTrainedConfig], default: PreTrainedConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = dict(OTHERS)
    for names, size in ((WIDTHS, WIDE), (INNER, 2 * WIDE), (DEPTHS, BLOCKS), (HEADS, 4), (HEAD_WIDTHS, NARROW)):
        sizes |= dict.fromkeys(names, size)
    has = default.to_dict().keys() | getattr(kind, "attribute_map", {}).keys()
    sizes = {name: size for name, size in sizes.items() if name in has} | IDS
    if default.to_dict().get("layer_types"):
        sizes["layer_types"] = list(default.layer_types[:BLOCKS])
    return sizes
