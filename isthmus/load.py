"""Load one side of a cut model from disk, and only that side.

Knows Hugging Face models and their files; knows no wire and no training. `transformers` itself builds, maps
and ties the weights; what belongs to the other side is replaced before any weight is read.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from isthmus.adapter_files import PEFT_SETTINGS
from isthmus.blocks import BlockList, find_blocks
from isthmus.cut import Cut
from isthmus.errors import CutError, IsthmusError, ModelError

REFUSED_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that depend on earlier requests: a served span must be a pure function."""

UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    StrictDataclassError,
)
"""What `transformers` raises over a configuration or weights that make no sense: they may be a peer's."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve(model: str) -> Path:
    """The local directory of a model given as a directory or a Hugging Face id.

    Raises:
        ModelError: neither is there, or the directory holds no configuration or no safetensors.
    """
    path = Path(model)
    if not path.is_dir():
        path = _snapshot(model)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json; give the directory of a saved Hugging Face model")
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path} holds no .safetensors weights; save the model with save_pretrained first")
    return path


def _snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except HFValidationError:
        raise ModelError(f"no model directory {model}; check the path") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise ModelError(
            f"{model} is neither a directory nor a model that can be reached; check the path or download it first"
        ) from None


def model_digest(directory: Path) -> str:
    """SHA-256 in hex over the configuration and every weight file, names included."""
    total = hashlib.sha256()
    for path in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def load_config(directory: Path) -> PreTrainedConfig:
    """Read a model's configuration.

    Raises:
        ModelError: it cannot be read, or the model is not a causal language model that can be served.
    """
    with _told_in_one_line(f"{directory}/config.json cannot be read"):
        return _checked_config(directory)


def _checked_config(directory: Path) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise CutError(f"{config.model_type} is an encoder-decoder, which cannot be cut yet; use a decoder")
    both_ways = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    if type(config) not in AutoModelForCausalLM._model_mapping or both_ways:  # the former lists BERT and its kin too
        raise ModelError(f"{config.model_type} is not a causal language model; use one such as llama or gpt2")
    for kind in _rope_types(getattr(config, "rope_parameters", None)):
        if kind in REFUSED_ROPE:
            raise CutError(f"{config.model_type} with {kind} rotary embeddings cannot be cut: they depend on history")
    return config


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model's files.

    Raises:
        ModelError: there is none that can be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = _first_line(error)[:120]
        raise ModelError(f"{directory} holds no tokenizer that can be read ({reason}); save one there") from None
    return tokenizer


def _rope_types(parameters: Any) -> list[str]:
    if not isinstance(parameters, dict):
        return []
    nested = [kind for value in parameters.values() for kind in _rope_types(value)]
    return [*nested, parameters["rope_type"]] if "rope_type" in parameters else nested


def load_whole(directory: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, BlockList]:
    """The whole model, frozen, in evaluation mode: the reference that a split one is compared with."""
    return load_trimmed(directory, dtype, find_blocks)


def load_ends(directory: Path, cut: Cut, dtype: torch.dtype | Literal["auto"]) -> tuple[PreTrainedModel, BlockList]:
    """Stem, bottom blocks, top blocks and head; pass-throughs stand where the span was.

    Raises:
        CutError: the cut does not fit the model.
        ModelError: the files cannot be read or lack weights of the ends.
    """

    def keep_ends(model: PreTrainedModel) -> BlockList:
        found = find_blocks(model)
        for number in cut.span(len(found.blocks)):
            found.replace(number)
        return found

    return load_trimmed(directory, dtype, keep_ends)


def load_span(
    directory: Path, cut: Cut, dtype: torch.dtype, quantization: Any = None, device: torch.device | None = None
) -> tuple[PreTrainedModel, BlockList]:
    """The model that owns the blocks with only the span's weights: no embeddings, no final norm, no head.

    Call its base model with `inputs_embeds` of the right shape while `isthmus.blocks.injecting` the real ones.

    Raises:
        CutError, ModelError: as `load_ends`.
    """

    def keep_span(model: PreTrainedModel) -> BlockList:
        found = find_blocks(model)
        for number in cut.ends(len(found.blocks)):
            found.replace(number)
        _hollow(model, found)
        return found

    config = load_config(directory)
    config.tie_word_embeddings = False  # nothing is left to tie
    placing = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": device}}
    return load_trimmed(directory, dtype, keep_span, config, **placing)


def outline(directory: Path) -> tuple[PreTrainedModel, BlockList]:
    """The whole model without weights, on the meta device.

    Raises:
        CutError, ModelError: as `load_ends`.
    """
    config = load_config(directory)
    with torch.device("meta"), _told_in_one_line(f"{directory} cannot be loaded"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model.requires_grad_(False).eval(), find_blocks(model)


class _Nothing(nn.Module):
    """Stands where an embedding was on the cloud: adds nothing to hidden states of any shape."""

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros(())


class _Same(nn.Module):
    """Stands where a norm or projection outside the blocks was on the cloud: returns its input."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


def _hollow(model: nn.Module, found: BlockList) -> None:
    """Replace every module outside the blocks that has weights, so that none of them is loaded."""
    for path, module in list(model.named_modules()):
        outside = not f"{path}.".startswith(f"{found.path}.")
        if outside and next(module.parameters(recurse=False), None) is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _Nothing() if isinstance(module, nn.Embedding) else _Same())


def load_trimmed(
    directory: Path,
    dtype: torch.dtype | Literal["auto"],
    trim: Callable[[PreTrainedModel], BlockList],
    config: PreTrainedConfig | None = None,
    **placing: Any,
) -> tuple[PreTrainedModel, BlockList]:
    """A model's weights without those that `trim` leaves no place for; frozen, in evaluation mode.

    Args:
        directory: where configuration and weights are.
        dtype: what to hold weights in; `auto`: as they are stored.
        trim: given the model without weights, takes out of it or changes what it must, and finds its blocks.
        config: the configuration, where it is not that of the directory.
        placing: how weights are quantised as they are read, and onto which device, as `from_pretrained` takes it.

    Raises:
        CutError, ModelError: as `load_ends`.
    """
    config = config or load_config(directory)
    if (directory / PEFT_SETTINGS).exists():
        raise ModelError(
            f"{directory} holds adapter_config.json, which is no part of a model; move the adapter elsewhere"
        )
    found: list[BlockList] = []
    family: Any = AutoModelForCausalLM._model_mapping[type(config)]

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        found.append(trim(self))

    # transformers builds the class on the meta device, reads only the weights that it still has, and ties them.
    trimmed: Any = type(family.__name__, (family,), {"__init__": build, "__module__": family.__module__})
    transformers_logging.disable_progress_bar()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the other side's weights are unexpected on purpose
    try:
        with _told_in_one_line(f"{directory} cannot be loaded"):
            model, report = trimmed.from_pretrained(
                directory,
                config=deepcopy(config),
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are in the report, and refused by name below
                **placing,
            )
    finally:
        transformers_logging.set_verbosity(level)
    _check_complete(directory, report)
    model.__class__ = family
    return model.requires_grad_(False).eval(), found[0]


def _check_complete(directory: Path, report: dict[str, Any]) -> None:
    if report["mismatched_keys"]:
        name, stored, due = min(report["mismatched_keys"])
        raise ModelError(
            f"{directory} holds {name} as {list(stored)} where its config.json needs {list(due)}; get both anew"
        )
    missing = report["missing_keys"]
    if missing:
        raise ModelError(f"{directory} lacks {len(missing)} weights of this side, such as {min(missing)}")


@contextmanager
def _told_in_one_line(what: str) -> Iterator[None]:
    """Let our own errors through, which say better what is wrong, and turn those of `transformers` into one line."""
    try:
        yield
    except IsthmusError:
        raise
    except UNREADABLE as error:
        kind = "" if isinstance(error, OSError | ValueError | StrictDataclassError) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())[:200]
        raise ModelError(f"{what} ({reason}); save or fetch the model anew") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
