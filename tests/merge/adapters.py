"""Adapters as plain peft saves them, of models that were never trained, and what becomes of them.

Knows peft, tiny models and one merge; says nothing of what should come of it.
"""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from emulator.changes import Changed
from emulator.merge import Adapter, examine, merge
from tests.emulator.adapters import outline, whole
from tests.emulator.conftest import QUIET
from tests.methods.cases import CASES, ONLY_LINEAR, Configured

PROMPTS = ("prompt", "p-tuning")
UNSEEN = ("trainable-tokens",)
"""Whose case trains rows that no prompt here needs; others stand below."""

CONVERTED = ("pissa", "olora")
"""Methods that plain peft saves relative to other weights than the model's, unless it is asked not to."""

SUFFIXES = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}


def simple(config: type[peft.PeftConfig] = peft.LoraConfig, **settings: Any) -> Configured:
    """Configured as people do: by the ends of names."""

    def make(family: str) -> peft.PeftConfig:
        return config(**{"task_type": "CAUSAL_LM", "target_modules": SUFFIXES[family], **settings})

    return make


def with_embedding(field: str, **settings: Any) -> Configured:
    """Also the embedding, in a field that lists modules."""

    def make(family: str) -> peft.PeftConfig:
        listed = {"target_modules": SUFFIXES[family], "modules_to_save": None}
        listed[field] = [*(listed[field] or []), EMBEDDING[family]]
        return peft.LoraConfig(task_type="CAUSAL_LM", **{**listed, **settings})

    return make


def patterns(family: str) -> peft.PeftConfig:
    last = SUFFIXES[family][-1]
    first = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.attn.c_attn"}[family]
    return simple(rank_pattern={f"^{first}": 6, last: 2}, alpha_pattern={f"^{first}": 5, last: 3})(family)


BOTH = ("llama", "gpt2")
VARIANTS: dict[str, tuple[Configured, tuple[str, ...]]] = {
    "ends of names": (simple(), BOTH),
    "all-linear": (simple(target_modules="all-linear"), BOTH),
    "no task": (simple(task_type=None), BOTH),
    "patterns": (patterns, BOTH),
    "rslora with patterns": (simple(use_rslora=True, rank_pattern={"c_attn": 2, "v_proj": 2}), BOTH),
    "some layers": (simple(layers_to_transform=[0, 5]), BOTH),
    "some layers of a list": (simple(layers_to_transform=3, layers_pattern=["layers", "h"]), BOTH),
    "excluded": (simple(exclude_modules=["0.self_attn.q_proj", "h.2.attn.c_attn"]), BOTH),
    "dora on all": (simple(use_dora=True, target_modules="all-linear"), BOTH),
    "biases": (simple(bias="all"), ("gpt2",)),
    "own biases": (simple(bias="lora_only"), ("gpt2",)),
    "lora bias": (simple(lora_bias=True, init_lora_weights=True), ("gpt2",)),
    "head whole": (simple(modules_to_save=["lm_head"]), BOTH),
    "embedding whole": (with_embedding("modules_to_save"), BOTH),
    "norms whole": (simple(modules_to_save=["norm", "ln_f"]), BOTH),
    "attention whole": (simple(modules_to_save=["layers.2.self_attn", "h.2.attn"]), BOTH),
    "head adapted": (simple(target_modules=["q_proj", "c_attn", "lm_head"]), BOTH),
    "embedding adapted": (with_embedding("target_modules"), BOTH),
    "embedding adapted by dora": (with_embedding("target_modules", use_dora=True), BOTH),
    "rows": (simple(trainable_token_indices=[9, 3, 258]), BOTH),
    "rows alone": (lambda _: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[9, 3]), BOTH),
    "gaussian start": (simple(init_lora_weights="gaussian"), BOTH),
    "vera drawn anew": (simple(peft.VeraConfig, r=8, save_projection=False), BOTH),
    "randlora sparse": (simple(peft.RandLoraConfig, r=4, randlora_alpha=8, sparse=True), BOTH),
    "gralora hybrid": (simple(peft.GraloraConfig, r=4, hybrid_r=2), BOTH),
    "ia3 as listed": (lambda _: peft.IA3Config(task_type="CAUSAL_LM"), BOTH),
    "ia3 without feedforward": (
        lambda family: peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=SUFFIXES[family],
            feedforward_modules=[],
            fan_in_fan_out=family == "gpt2",
        ),
        BOTH,
    ),
    "lokr both": (simple(peft.LoKrConfig, r=2, decompose_both=True, decompose_factor=4), ONLY_LINEAR),
    "miss bat": (simple(peft.MissConfig, r=8, init_weights="bat"), ONLY_LINEAR),
    "miss mini": (simple(peft.MissConfig, r=8, mini_r=4, init_weights="mini"), ONLY_LINEAR),
    "hra orthogonal": (simple(peft.HRAConfig, r=4, apply_GS=True), ONLY_LINEAR),
    "oft shared": (simple(peft.OFTConfig, oft_block_size=8, block_share=True), ONLY_LINEAR),
    "oft exact": (simple(peft.OFTConfig, oft_block_size=8, use_cayley_neumann=False), ONLY_LINEAR),
    "boft of factors": (simple(peft.BOFTConfig, boft_block_size=8, boft_n_butterfly_factor=2), ONLY_LINEAR),
    "road 4": (simple(peft.RoadConfig, group_size=8, variant="road_4"), ONLY_LINEAR),
    "c3a of sizes": (simple(peft.C3AConfig, block_size=8, block_size_pattern={"q_proj": 16}), ONLY_LINEAR),
}
"""Settings beyond a method's own name, each for the families that peft takes it for."""

PLAIN = {
    case.name: (case.plain, case.families)
    for case in CASES
    if case.plain is not None and case.name not in (*PROMPTS, *CONVERTED, *UNSEEN)
}
EACH = [(name, family) for name, (_, families) in (PLAIN | VARIANTS).items() for family in families]


def made(model: Path, place: Path, configured: Configured, family: str) -> Path:
    """What plain peft saves, with values that matter."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(whole(model), configured(family))
        disturb(adapted)
        adapted.save_pretrained(place)
    return place


@torch.no_grad()
def disturb(adapted: nn.Module) -> None:
    """Move every trained value."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape)


def named(name: str) -> Configured:
    return (PLAIN | VARIANTS)[name][0]


def merged(model: Path, adapter: Path, out: Path) -> tuple[Adapter, Changed]:
    examined = examine(adapter, model, outline(model))
    return examined, merge(examined, model, out, QUIET)


def beside(model: Path, adapter: Path) -> nn.Module:
    """Plain peft's model with the adapter beside its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(whole(model), str(adapter)).eval()
