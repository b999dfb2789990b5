"""What methods train in LLaMA models with peft's usual settings, by hand; papers print few of these."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import peft

from isthmus.planning.trainable import trainable
from tests.planning.known_counts import Told, lora
from tests.planning.known_models import configuration, outline

MODELS = ("LLaMA-7B", "LLaMA-13B", "LLaMA-30B", "LLaMA-65B", "Llama-3-70B")


@dataclass(frozen=True)
class Widths:
    """Of a model: hidden states d, the inner layer f, all keys of a token k, and its blocks."""

    d: int
    f: int
    k: int
    blocks: int


@dataclass(frozen=True, eq=False)
class Usual:
    """A method with a setting, and what it trains by hand."""

    method: str
    setting: str
    told: Told
    by_hand: Callable[[Widths], int]


USUAL = (
    Usual("LoRA", "q, v; rank 8", lora("CAUSAL_LM"), lambda w: w.blocks * 8 * (2 * w.d + w.d + w.k)),
    Usual(
        "AdaLoRA",
        "q, v; first rank 12",
        peft.AdaLoraConfig(
            task_type="CAUSAL_LM", init_r=12, target_modules=["q_proj", "v_proj"], total_step=9, tinit=1, tfinal=1
        ),
        lambda w: w.blocks * (12 * (2 * w.d + w.d + w.k) + 2 * 12),
    ),
    Usual("IA3", "k, v, down's input", peft.IA3Config(task_type="CAUSAL_LM"), lambda w: w.blocks * (2 * w.k + w.f)),
    Usual("LN tuning", "every norm", peft.LNTuningConfig(task_type="CAUSAL_LM"), lambda w: (2 * w.blocks + 1) * w.d),
    Usual("BitFit", "every bias", "bitfit", lambda _: 0),
    Usual(
        "prompt tuning",
        "20 tokens",
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
        lambda w: 20 * w.d,
    ),
    Usual(
        "prefix tuning",
        "20 tokens",
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
        lambda w: 20 * w.blocks * 2 * w.k,
    ),
)


def widths(model: str) -> Widths:
    config = configuration(model)
    keys = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return Widths(config.hidden_size, config.intermediate_size, keys, config.num_hidden_layers)


@cache
def usually(model: str, usual: Usual) -> int:
    return trainable(outline(model), usual.told).total
