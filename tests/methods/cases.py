"""Every method once: how a run is told to use it on a tiny model, and the plain `peft` configuration that this means.

The configurations are written out by hand: nothing here comes from the edge's own table but the names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft

from tests.parity.reference import BLOCK_LIST, end_blocks

CUT = "1:1"
FAMILIES = ("llama", "gpt2")
QV = {"llama": ("self_attn.q_proj", "self_attn.v_proj"), "gpt2": ("attn.c_attn",)}
NORMS = {"llama": ("input_layernorm", "post_attention_layernorm"), "gpt2": ("ln_1", "ln_2")}
LAST_NORM = {"llama": "model.norm", "gpt2": "transformer.ln_f"}
EMBEDDING = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}
SCALED = {
    "llama": ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_attn", "mlp.c_proj"),
}

Configured = Callable[[str], peft.PeftConfig]


def modules(family: str, *names: str) -> list[str]:
    """Full names of these modules of the end blocks."""
    return [f"{BLOCK_LIST[family]}.{number}.{name}" for number in end_blocks(CUT) for name in names]


@dataclass(frozen=True)
class Case:
    """A method, the settings of a run, and what plain peft has for it; None where peft has nothing."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    plain: Configured | None = None
    families: tuple[str, ...] = FAMILIES


def linears(config: type[peft.PeftConfig], **settings: Any) -> Configured:
    """peft's own configuration on the family's usual linear modules."""

    def make(family: str) -> peft.PeftConfig:
        layout = {"fan_in_fan_out": family == "gpt2"} if hasattr(config, "fan_in_fan_out") else {}
        return config(task_type="CAUSAL_LM", target_modules=modules(family, *QV[family]), **layout, **settings)

    return make


def scaled(family: str) -> peft.PeftConfig:
    names = modules(family, *SCALED[family])
    inner = [name for name in names if name.endswith((".down_proj", "mlp.c_proj"))]
    return peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=names, feedforward_modules=inner, fan_in_fan_out=family == "gpt2"
    )


def norms(family: str) -> peft.PeftConfig:
    names = [*modules(family, *NORMS[family]), LAST_NORM[family]]
    return peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=names)


def tokens(family: str) -> peft.PeftConfig:
    return peft.TrainableTokensConfig(
        task_type="CAUSAL_LM", target_modules=[EMBEDDING[family]], token_indices=[70, 75, 80]
    )


def lora(**settings: Any) -> Configured:
    return linears(peft.LoraConfig, r=4, lora_alpha=8, **settings)


LORA = {"rank": 4, "alpha": 8.0}
RANK = {"rank": 4}
ONLY_LINEAR = ("llama",)
"""GPT-2's modules are Conv1D, which peft's layers of these methods do not take."""


def option(**options: Any) -> dict[str, Any]:
    return {"peft_option": options}


CASES = (
    Case("lora", LORA, lora()),
    Case("rslora", LORA, lora(use_rslora=True)),
    Case("dora", LORA, lora(use_dora=True)),
    Case("pissa", LORA, lora(init_lora_weights="pissa")),
    Case("olora", LORA, lora(init_lora_weights="olora"), ONLY_LINEAR),
    Case("orthogonal", LORA, lora(init_lora_weights="orthogonal")),
    Case("adalora", LORA, linears(peft.AdaLoraConfig, init_r=6, target_r=4, lora_alpha=8, total_step=4, tfinal=2)),
    Case("ia3", {}, scaled),
    Case("ln-tuning", {}, norms),
    Case("vera", RANK, linears(peft.VeraConfig, r=4)),
    Case("randlora", LORA, linears(peft.RandLoraConfig, r=4, randlora_alpha=8)),
    Case(
        "vblora",
        {**RANK, **option(vector_length=8, num_vectors=16)},
        linears(peft.VBLoRAConfig, r=4, vector_length=8, num_vectors=16),
    ),
    Case("loha", LORA, linears(peft.LoHaConfig, r=4, alpha=8), ONLY_LINEAR),
    Case("lokr", LORA, linears(peft.LoKrConfig, r=4, alpha=8), ONLY_LINEAR),
    Case("hira", RANK, linears(peft.HiraConfig, r=4)),
    Case("gralora", LORA, linears(peft.GraloraConfig, r=4, alpha=8)),
    Case("delora", RANK, linears(peft.DeloraConfig, r=4), ONLY_LINEAR),
    Case("miss", RANK, linears(peft.MissConfig, r=4), ONLY_LINEAR),
    Case("hra", RANK, linears(peft.HRAConfig, r=4), ONLY_LINEAR),
    Case("oft", option(oft_block_size=8), linears(peft.OFTConfig, oft_block_size=8), ONLY_LINEAR),
    Case("boft", option(boft_block_size=8), linears(peft.BOFTConfig, boft_block_size=8), ONLY_LINEAR),
    Case("road", option(group_size=8), linears(peft.RoadConfig, group_size=8), ONLY_LINEAR),
    Case("c3a", option(block_size=8), linears(peft.C3AConfig, block_size=8), ONLY_LINEAR),
    Case("fourierft", option(n_frequency=16), linears(peft.FourierFTConfig, n_frequency=16, init_weights=True)),
    Case("trainable-tokens", option(token_indices=[70, 75, 80]), tokens),
    Case(
        "prompt",
        option(num_virtual_tokens=5),
        lambda _: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ),
    Case(
        "p-tuning",
        option(num_virtual_tokens=5, encoder_hidden_size=16),
        lambda _: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    ),
    Case("bitfit", families=("gpt2",)),
    Case("full"),
    Case("head"),
)

EACH = [(case, family) for case in CASES for family in case.families]
IN_PEFT = [(case, family) for case, family in EACH if case.plain is not None]


def by_name(name: str) -> Case:
    """The case of a method."""
    return next(case for case in CASES if case.name == name)


def named(case_and_family: object) -> str | None:
    """A case's name in the names of tests."""
    return case_and_family.name if isinstance(case_and_family, Case) else None
