"""The methods of `--peft`: one table of what each is in `peft`, what it goes to, and what it can be told.

Knows peft's configurations by name, and settings; knows no model and trains nothing. Peft itself is imported where its
fields are asked for, so that most settings are judged without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import yaml

from isthmus.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftConfig

Place = Literal["linears", "norms", "embedding", "prompt", "weights", "beside"]
"""What a method goes to: linear modules; norms; the embedding; virtual tokens in front of every row; the ends' own
weights; or a network of its own beside the blocks."""

OLDER_RANK, OLDER_ALPHA = 8, 16.0
"""What older runs say of every method, of those without a rank too."""


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        place: what it goes to.
        config: what peft calls its configuration; None: peft does not have the method.
        fixed: fields of the configuration that make it this method.
        preset: fields that stand unless they are told; where none is here, peft's own default stands.
        rank, alpha: the fields that `--rank` and `--alpha` set; None: it has none.
        dropout: it takes `--dropout`.
        needs: fields that must be told.
        usual: whose usual modules of a family it goes to, as peft lists them.
    """

    place: Place
    config: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)
    rank: str | None = None
    alpha: str | None = None
    dropout: bool = False
    needs: tuple[str, ...] = ()
    usual: Literal["lora", "ia3"] = "lora"

    def default(self, setting: Literal["rank", "alpha"]) -> Any:
        """What `--rank` or `--alpha` is unless it is told; None where there is none."""
        name = self.rank if setting == "rank" else self.alpha
        if name is None:
            return None
        return self.preset[name] if name in self.preset else _fields(self.config).get(name)


def _lora(dropout: bool = False, **fixed: Any) -> Method:
    preset = {"r": 8, "lora_alpha": 16.0}
    return Method("linears", "LoraConfig", fixed, preset, rank="r", alpha="lora_alpha", dropout=dropout)


def _linears(config: str, rank: str | None = "r", alpha: str | None = None, **preset: Any) -> Method:
    return Method("linears", config, preset=preset, rank=rank, alpha=alpha)


METHODS: dict[str, Method] = {
    "lora": _lora(dropout=True),
    "rslora": _lora(dropout=True, use_rslora=True),
    "dora": _lora(use_dora=True),
    "pissa": _lora(init_lora_weights="pissa"),
    "olora": _lora(init_lora_weights="olora"),
    "orthogonal": _lora(init_lora_weights="orthogonal"),
    "adalora": _linears("AdaLoraConfig", "target_r", "lora_alpha", lora_alpha=16.0),
    "ia3": Method("linears", "IA3Config", usual="ia3"),
    "ln-tuning": Method("norms", "LNTuningConfig"),
    "vera": _linears("VeraConfig"),
    "randlora": _linears("RandLoraConfig", "r", "randlora_alpha"),
    "vblora": _linears("VBLoRAConfig"),
    "loha": _linears("LoHaConfig", "r", "alpha"),
    "lokr": _linears("LoKrConfig", "r", "alpha"),
    "hira": _linears("HiraConfig"),
    "gralora": _linears("GraloraConfig", "r", "alpha"),
    "delora": _linears("DeloraConfig"),
    "miss": _linears("MissConfig"),
    "hra": _linears("HRAConfig"),
    "oft": _linears("OFTConfig", None),
    "boft": _linears("BOFTConfig", None),
    "road": _linears("RoadConfig", None),
    "c3a": _linears("C3AConfig", None),
    "fourierft": _linears("FourierFTConfig", None, init_weights=True),  # else it begins far from the model it adapts
    "trainable-tokens": Method("embedding", "TrainableTokensConfig", needs=("token_indices",)),
    "prompt": Method("prompt", "PromptTuningConfig", preset={"num_virtual_tokens": 20}),
    "p-tuning": Method("prompt", "PromptEncoderConfig", preset={"num_virtual_tokens": 20}),
    "bitfit": Method("weights"),
    "full": Method("weights"),
    "head": Method("weights"),
    "side": Method("beside"),
}
"""Every method that there is, by its name on the command line."""

REFUSED: dict[str, str] = {
    "prefix": "its keys and values for the span's blocks would have to be on the cloud; use --peft prompt or p-tuning",
    "adaption-prompt": "loaded into the whole model, its file makes another model than was trained; use --peft prompt",
    "cpt": "it has a loss of its own, over kinds of tokens that rows do not name; use --peft prompt",
    "multitask-prompt": "it needs the number of a task with every row; use --peft prompt",
    "poly": "it needs the number of a task with every row; use --peft lora",
    "xlora": "it mixes adapters that were trained before; use --peft lora",
    "lily": "loaded into the whole model, its file makes another model than was trained; use --peft lora",
    "shira": "it computes with sparse tensors, whose memory and operations no report could count; use --peft lora",
    "waveft": "what it costs cannot be told from shapes, so no report could count it; use --peft fourierft",
}
"""Methods of peft that are refused, and why."""

OWN = frozenset({"target_modules", "feedforward_modules", "fan_in_fan_out", "task_type", "peft_type", "inference_mode"})
"""Fields that are set here, never told."""

NOT_TOLD = frozenset(
    # of where an adapter goes, which --targets says
    {"exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "layer_replication"}
    # of other parts that would train along with it
    | {"modules_to_save", "bias", "trainable_token_indices", "ensure_weight_tying"}
    # of other machines, models and variants, or of what is read from elsewhere
    | {"megatron_core", "alora_invocation_tokens", "use_qalora", "qalora_group_size", "use_bdlora", "runtime_config"}
    | {"tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_text", "save_projection"}
    | {"save_only_topk_weights", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
    # of this run
    | {"total_step", "r"}
)
"""Fields that no option may name, beside those that every configuration of peft has."""

STARTS = (True, False, "gaussian", "pissa", "olora", "orthogonal")
"""What `init_lora_weights` may be, beside `pissa_niter_N`; the others need data, or another model."""


MISTAKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What peft raises over settings that do not fit a model."""


def method_of(name: str) -> Method:
    """A line of the table.

    Raises:
        UsageError: there is no such method, or it cannot be had.
    """
    if name in REFUSED:
        raise UsageError(f"--peft {name} cannot train a model that is cut: {REFUSED[name]}")
    if name not in METHODS:
        raise UsageError(f"--peft {name} is no method here; known are {', '.join(METHODS)}")
    return METHODS[name]


def options_of(name: str) -> tuple[str, ...]:
    """The fields that `--peft-option` may set for a method, in order."""
    method = method_of(name)
    if method.config is None:
        return ()
    spoken_for = OWN | NOT_TOLD | _fields("PeftConfig").keys() | {*method.fixed, method.rank, method.alpha}
    ends = (
        "_config",
        "_pattern",
        "dropout",
    )  # dropout beside --dropout would drop nothing: nothing is in training mode
    return tuple(sorted(one for one in _fields(method.config) if one not in spoken_for and not one.endswith(ends)))


def check(name: str, rank: int | None, alpha: float | None, dropout: float, options: Mapping[str, Any]) -> None:
    """Refuse by name what a method cannot be told.

    Raises:
        UsageError: there is no such method, or it lacks what was told, or what it needs was not.
    """
    method = method_of(name)
    known = options_of(name) if options else ()
    if rank is not None and method.rank is None:
        raise UsageError(f"--peft {name} has no rank; leave out --rank")
    if alpha is not None and method.alpha is None:
        raise UsageError(f"--peft {name} has no alpha; leave out --alpha")
    if dropout and not method.dropout:
        raise UsageError(f"--dropout goes with --peft lora and rslora; leave it out with {name}")
    for option in options:
        if option not in known:
            may_be = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UsageError(f"--peft-option {option} is none of --peft {name}: {may_be}")
    for option in method.needs:
        if option not in options:
            raise UsageError(f"--peft {name} needs --peft-option {option}=..., such as {option}=[5,6]")
    start = options.get("init_lora_weights", True)
    if start not in STARTS and not str(start).startswith("pissa_niter_"):
        listed = ", ".join(map(str, STARTS)).lower()
        raise UsageError(f"--peft-option init_lora_weights={start} is none of {listed}, pissa_niter_N")


def read_options(given: Sequence[str]) -> dict[str, Any]:
    """The options that `--peft-option NAME=VALUE` names, each value being YAML.

    Raises:
        UsageError: one is not so written, or named twice.
    """
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name) or name in options:
            raise UsageError(f"--peft-option {text} is not NAME=VALUE, or is given twice; write it once, so")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--peft-option {text}: the value is not YAML; quote it") from None
    return options


def configure(
    name: str, rank: int | None, alpha: float | None, dropout: float, options: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    """The fields of a method's configuration but for those of the modules.

    Args:
        name: of the method, which peft must have.
        rank: None where it has none.
        alpha: the same.
        dropout: share of its input.
        options: what `--peft-option` told.
        steps: of the run, which AdaLoRA's schedule takes shares of.
    """
    method = METHODS[name]
    told = {**method.preset, **options, **method.fixed}
    told |= {one: value for one, value in ((method.rank, rank), (method.alpha, alpha)) if one is not None}
    if method.config == "AdaLoraConfig":
        told = {**_schedule(told, steps), **told, "total_step": steps}
    if dropout:
        told["lora_dropout"] = dropout
    return {"task_type": "CAUSAL_LM", **told}


def _schedule(told: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """AdaLoRA's shares as in the paper's runs (Zhang et al., 2023): half as much rank again to begin with, about a
    seventh of the steps before ranks shrink, and about half after.
    """
    begin, rank = int(told.get("tinit", steps * 3 // 20)), told["target_r"]
    return {"init_r": (3 * rank + 1) // 2, "tinit": begin, "tfinal": max(0, min(steps // 2, steps - begin - 1))}


def new_config(name: str, settings: Mapping[str, Any]) -> "PeftConfig":
    """Peft's configuration of a method.

    Raises:
        UsageError: the installed peft does not have it, or refuses the settings.
    """
    import peft

    method = METHODS[name]
    if method.config is None or not hasattr(peft, method.config):
        raise UsageError(f"the peft that is installed, {peft.__version__}, has no {name}; install a newer one")
    if "init_r" in settings and settings["init_r"] <= settings["target_r"]:
        raise UsageError(
            f"init_r {settings['init_r']} must be more than --rank {settings['target_r']}, which it ends at"
        )
    with refusals_of(name):
        return getattr(peft, method.config)(**settings)


@contextmanager
def refusals_of(name: str) -> Iterator[None]:
    """In here peft's errors over settings that do not fit become one line that says what to set.

    Raises:
        UsageError: instead of them.
    """
    try:
        yield
    except UsageError:
        raise
    except MISTAKEN as error:
        options, reason = ", ".join(options_of(name)), " ".join(str(error).split())[:200].rstrip(".")
        raise UsageError(
            f"peft refuses --peft {name} here: {reason}; set --targets, or --peft-option with {options}"
        ) from None


def _fields(config: str | None) -> dict[str, Any]:
    """The fields of a configuration of peft and their defaults; none where peft does not have it."""
    import peft

    known = getattr(peft, config or "", None)
    return {one.name: one.default for one in fields(known)} if known is not None else {}
