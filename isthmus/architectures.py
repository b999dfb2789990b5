"""Which class of `transformers` a configuration is built as, and which way its tokens look.

Knows configurations and the mappings of `transformers`; reads no files and builds nothing.
"""

from copy import deepcopy
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from isthmus.errors import CutError, ModelError

REFUSED_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that depend on earlier requests: a served span must be a pure function."""

BEHIND_PADDING = frozenset(
    {"camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta"}
    | {"xlm-roberta-xl", "xmod"}
)
"""Families that number a row's tokens from behind the padding's id on."""


def longest_row(config: PreTrainedConfig) -> int | None:
    """Tokens that a row may have by its positions; None: any number."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and config.model_type in BEHIND_PADDING:
        return int(positions) - int(text.pad_token_id or 0) - 1
    return None if positions is None else int(positions)


def reads_both_ways(config: PreTrainedConfig) -> bool:
    """Whether tokens see those behind them: such a model predicts no next token and keeps no keys and values."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return True
    # The mapping of causal models lists BERT and its kin too.
    return type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)


def class_of(config: PreTrainedConfig, classifies: bool = False) -> type[PreTrainedModel]:
    """The class that a model is built as: a classifier, else a causal language model, else the bare model.

    The bare model is what an encoder is here, and a language model that was saved as a classifier, without its output
    layer.

    Raises:
        ModelError: `transformers` has no classifier of this family.
    """
    headless = any("Classification" in str(name) for name in config.architectures or ())
    auto: Any = AutoModel if headless or reads_both_ways(config) else AutoModelForCausalLM
    if classifies:
        auto = _classifying(config)
        if auto is None:
            raise ModelError(f"transformers has no classifier of {config.model_type}; use another model")
    built: Any = auto._model_mapping[type(config)]
    first: type[PreTrainedModel] = built[0] if isinstance(built, tuple) else built  # others are for other training
    return first


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuse by name what cannot be cut.

    Raises:
        CutError: an encoder-decoder, or a span that would not be a pure function.
        ModelError: neither a causal language model nor an encoder that classifies.
    """
    family = config.model_type
    if config.is_encoder_decoder:
        raise CutError(f"{family} is an encoder-decoder, which cannot be cut yet; use a decoder")
    if reads_both_ways(config) and (_classifying(config) is None or type(config) not in AutoModel._model_mapping):
        raise ModelError(
            f"{family} is neither a causal language model nor an encoder that classifies; "
            "use one such as llama, gpt2 or bert"
        )
    for kind in _rope_types(getattr(config, "rope_parameters", None)):
        if kind in REFUSED_ROPE:
            raise CutError(f"{family} with {kind} rotary embeddings cannot be cut: they depend on history")


def _classifying(config: PreTrainedConfig) -> Any:
    """The mapping that has a classifier of this family: of text before pictures; None: none has."""
    kinds: tuple[Any, ...] = (AutoModelForSequenceClassification, AutoModelForImageClassification)
    return next((kind for kind in kinds if type(config) in kind._model_mapping), None)


def _rope_types(parameters: Any) -> list[str]:
    if not isinstance(parameters, dict):
        return []
    nested = [kind for value in parameters.values() for kind in _rope_types(value)]
    return [*nested, parameters["rope_type"]] if "rope_type" in parameters else nested


def shortened(config: PreTrainedConfig, blocks: int, vocabulary: int) -> PreTrainedConfig:
    """A configuration with other numbers of blocks and tokens; lists with an item for each block are cut short."""
    short = deepcopy(config)
    text = short.get_text_config()
    for name, value in vars(text).copy().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:blocks])
    text.num_hidden_layers, text.vocab_size = blocks, vocabulary
    for special in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, special, 0)
    return short
