"""The methods of peft whose adapters can be merged, and what the settings of each may say.

Knows fields of peft's configurations by name, and which values of them are harmless; knows no files, no model and no
tensors. The table is closed: what is not in it is never told to peft.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from emulator.lora_settings import shown

Kind = Literal["flag", "number", "size", "numbers by name", "sizes by name"] | range | tuple[Any, ...]
"""What a field may hold: a size is a whole number that tensors go by, and is capped by those; a range has whole numbers
of steps, which are work whatever the tensors' size; a tuple lists all that it may be."""

MOST_DIGITS = 1 << 62
"""No number is larger: seeds are the largest."""

_STEPS = range(65)
"""Of products with a whole matrix; five is usual."""
_REFLECTIONS = range(257)
"""Of a whole matrix, one after the other, and of each other; eight are usual."""

_SCALE: Mapping[str, Kind] = {"fan_in_fan_out": "flag"}
_DRAWN: Mapping[str, Kind] = {**_SCALE, "r": "size", "projection_prng_key": "number", "save_projection": "flag"}
_BIASES: Mapping[str, Kind] = {"bias": ("none", "all", "lora_only", "boft_only", "oft_only", "delora_only")}
_LYCORIS: Mapping[str, Kind] = {
    "r": "size",
    "alpha": "number",
    "rank_pattern": "sizes by name",
    "alpha_pattern": "numbers by name",
}
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways for LoRA to begin that leave the model's own weights as they are."""


@dataclass(frozen=True)
class Mergeable:
    """One line of the table.

    Attributes:
        config: what peft calls its configuration.
        fields: those of its fields that say what the tensors mean.
        set_here: fields that are set whatever the adapter says.
    """

    config: str
    fields: Mapping[str, Kind]
    set_here: Mapping[str, Any]


def _method(config: str, fields: Mapping[str, Kind], **set_here: Any) -> Mergeable:
    return Mergeable(config, fields, set_here)


METHODS: dict[str, Mergeable] = {
    "LORA": _method(
        "LoraConfig",
        {
            **_SCALE,
            **_BIASES,
            "r": "size",
            "lora_alpha": "number",
            "use_rslora": "flag",
            "use_dora": "flag",
            "lora_bias": "flag",
            "rank_pattern": "sizes by name",
            "alpha_pattern": "numbers by name",
        },
    ),
    "ADALORA": _method(
        "AdaLoraConfig",
        {**_SCALE, **_BIASES, "init_r": "size", "lora_alpha": "number"},
        r=8,
        total_step=1,
        rank_pattern=None,
    ),
    "IA3": _method("IA3Config", _SCALE),
    "LN_TUNING": _method("LNTuningConfig", {}),
    "VERA": _method("VeraConfig", {**_DRAWN, **_BIASES}),
    "RANDLORA": _method(
        "RandLoraConfig", {**_DRAWN, **_BIASES, "randlora_alpha": "number", "sparse": "flag", "very_sparse": "flag"}
    ),
    "VBLORA": _method(
        "VBLoRAConfig",
        {**_SCALE, **_BIASES, "r": "size", "num_vectors": "size", "vector_length": "size", "topk": "size"},
    ),
    "LOHA": _method("LoHaConfig", _LYCORIS),
    "LOKR": _method("LoKrConfig", {**_LYCORIS, "decompose_both": "flag", "decompose_factor": "number"}),
    "HIRA": _method("HiraConfig", {**_SCALE, "r": "size", "rank_pattern": "sizes by name"}),
    "GRALORA": _method(
        "GraloraConfig",
        {**_SCALE, **_BIASES, "r": "size", "hybrid_r": "size", "alpha": "number", "gralora_k": "size"},
    ),
    "DELORA": _method(
        "DeloraConfig",
        {
            **_BIASES,
            "r": "size",
            "delora_lambda": "number",
            "rank_pattern": "sizes by name",
            "lambda_pattern": "numbers by name",
        },
    ),
    "MISS": _method(
        "MissConfig", {**_BIASES, "r": "size", "mini_r": "size", "init_weights": (True, False, "bat", "mini")}
    ),
    "HRA": _method("HRAConfig", {**_BIASES, "r": _REFLECTIONS, "apply_GS": "flag"}),
    "OFT": _method(
        "OFTConfig",
        {
            **_SCALE,
            **_BIASES,
            "r": "size",
            "oft_block_size": "size",
            "coft": "flag",
            "eps": "number",
            "block_share": "flag",
            "use_cayley_neumann": "flag",
            "num_cayley_neumann_terms": _STEPS,
        },
    ),
    "BOFT": _method(
        "BOFTConfig",
        {**_SCALE, **_BIASES, "boft_block_size": "size", "boft_block_num": "size", "boft_n_butterfly_factor": _STEPS},
    ),
    "ROAD": _method("RoadConfig", {"variant": ("road_1", "road_2", "road_4"), "group_size": "size"}),
    "C3A": _method("C3AConfig", {**_BIASES, "block_size": "size", "block_size_pattern": "sizes by name"}),
    "FOURIERFT": _method(
        "FourierFTConfig",
        {
            **_SCALE,
            **_BIASES,
            "n_frequency": "number",
            "scaling": "number",
            "random_loc_seed": "number",
            "n_frequency_pattern": "numbers by name",
        },
        init_weights=True,
    ),
    "TRAINABLE_TOKENS": _method("TrainableTokensConfig", {}),
}
"""Every method that can be merged, by what peft calls it."""

_IN_FRONT = "it puts virtual tokens before each row, which no weights hold; serve the model as it is, and have "
_IN_FRONT += "whoever runs it load the adapter with peft"
_MIXED = "it mixes adapters by each row, which no weights can; have it trained with lora"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"), _IN_FRONT),
    **dict.fromkeys(("CPT", "CARTRIDGE"), _IN_FRONT),
    **dict.fromkeys(("POLY", "XLORA"), _MIXED),
    "ADAPTION_PROMPT": "it adds to the attention itself, which no weights hold; have it trained with lora",
}
"""Methods of peft that leave no weights to merge, and what to do instead."""

NAMES = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"})
NAMES |= {"feedforward_modules", "trainable_token_indices", "token_indices"}
"""Fields that name modules or rows of the embedding."""

SAYS_NOTHING = frozenset(
    # of where it is from and how it runs
    {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "runtime_config"}
    # of how it began
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "init_weights", "init_ia3_weights", "d_initial"}
    | {"init_vector_bank_bound", "init_logits_std"}
    # of how it was trained
    | {"lora_dropout", "vera_dropout", "randlora_dropout", "vblora_dropout", "hira_dropout", "gralora_dropout"}
    | {"miss_dropout", "boft_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d"}
    | {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
    # unless other fields, which are refused, say that it is
    | {"qalora_group_size"}
)
"""Fields that say nothing about the weights that the tensors make: peft is never told them."""

CHECKED: dict[str, Kind] = {
    "task_type": (None, "CAUSAL_LM", "SEQ_CLS"),
    "init_lora_weights": _STARTS,
    "megatron_core": (None, "megatron.core"),
}
"""Fields that must be harmless, and are not told either."""


def fits(value: Any, kind: Kind) -> bool:
    """Whether a field may hold a value; sizes are capped elsewhere."""
    match kind:
        case "flag":
            return isinstance(value, bool)
        case "number":
            return _is_number(value) or value is None
        case "size":
            return _is_size(value)
        case "numbers by name" | "sizes by name":
            good = _is_number if kind.startswith("numbers") else _is_size
            return value is None or (isinstance(value, dict) and all(map(good, value.values())))
        case range():
            return _is_size(value) and value in kind
        case _:
            return any(value is one or (isinstance(value, str) and value == one) for one in kind)


def sizes_in(value: Any, kind: Kind) -> tuple[int, ...]:
    """The sizes that a field sets."""
    if kind == "sizes by name":
        return tuple((value or {}).values())
    return (value,) if kind == "size" else ()


def method_named(peft_type: Any) -> Mergeable | str:
    """The line of a method, or why there is none."""
    if isinstance(peft_type, str) and peft_type in METHODS:
        return METHODS[peft_type]
    if isinstance(peft_type, str) and peft_type in REFUSED:
        return f"{peft_type} cannot be merged: {REFUSED[peft_type]}"
    known = ", ".join(METHODS)
    return f"{shown(peft_type)} is no method that is merged here: have it trained with one of {known}"


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= MOST_DIGITS
    return isinstance(value, float) and isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 0
