"""Load one side of a cut model from disk, and only that side.

Knows Hugging Face models and their files; knows no wire and no training. `transformers` itself builds, maps
and ties the weights; what belongs to the other side is replaced before any weight is read.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from errno import ENOMEM
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from isthmus.adapter_files import PEFT_SETTINGS
from isthmus.architectures import check_architecture, class_of, reads_both_ways
from isthmus.blocks import BlockList, find_blocks
from isthmus.classifier import Head
from isthmus.cut import Cut
from isthmus.errors import IsthmusError, ModelError
from isthmus.head import draw, modules_anew
from isthmus.sides import keep_ends, keep_span

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

MOST_NAMES = 100_000
"""Of labels, in a configuration."""

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
        ModelError: it cannot be read, or the model is of no kind that can be served.
    """
    with _told_in_one_line(f"{directory}/config.json cannot be read"):
        return _checked_config(directory)


def _checked_config(directory: Path) -> PreTrainedConfig:
    json.loads((directory / "config.json").read_bytes(), object_hook=_refuse_many_labels)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    check_architecture(config)
    return config


def _refuse_many_labels(settings: dict[str, Any]) -> None:
    """A name is made for each label of a count, however large the count is."""
    count = settings.get("num_labels")
    if isinstance(count, int) and count > MOST_NAMES:
        raise ValueError(f"num_labels is {count:,}, and may be {MOST_NAMES:,}")


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


def load_whole(directory: Path, dtype: torch.dtype, head: Head | None = None) -> tuple[PreTrainedModel, BlockList]:
    """The whole model, frozen, in evaluation mode: the reference that a split one is compared with."""
    return load_trimmed(directory, dtype, find_blocks, head=head)


def load_ends(
    directory: Path, cut: Cut, dtype: torch.dtype | Literal["auto"], head: Head | None = None
) -> tuple[PreTrainedModel, BlockList]:
    """Stem, bottom blocks, top blocks and head; pass-throughs stand where the span was.

    Raises:
        CutError: the cut does not fit the model.
        ModelError: the files cannot be read or lack weights of the ends.
    """

    def trim(model: PreTrainedModel) -> BlockList:
        found = find_blocks(model)
        keep_ends(found, cut)
        return found

    return load_trimmed(directory, dtype, trim, head=head)


def load_span(
    directory: Path, cut: Cut, dtype: torch.dtype, quantization: Any = None, device: torch.device | None = None
) -> tuple[PreTrainedModel, BlockList]:
    """The model that owns the blocks with only the span's weights: no embeddings, no final norm, no head.

    Call its base model with `inputs_embeds` of the right shape while `isthmus.blocks.injecting` the real ones.

    Raises:
        CutError, ModelError: as `load_ends`.
    """

    def trim(model: PreTrainedModel) -> BlockList:
        found = find_blocks(model)
        keep_span(model, found, cut)
        return found

    config = load_config(directory)
    config.tie_word_embeddings = False  # nothing is left to tie
    placing = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": device}}
    return load_trimmed(directory, dtype, trim, config, **placing)


def outline(directory: Path) -> tuple[PreTrainedModel, BlockList]:
    """The whole model without weights, on the meta device.

    Raises:
        CutError, ModelError: as `load_ends`.
    """
    config = load_config(directory)
    with torch.device("meta"), _told_in_one_line(f"{directory} cannot be loaded"):
        model = class_of(config)(config)
        return model.requires_grad_(False).eval(), find_blocks(model)


def load_trimmed(
    directory: Path,
    dtype: torch.dtype | Literal["auto"],
    trim: Callable[[PreTrainedModel], BlockList],
    config: PreTrainedConfig | None = None,
    head: Head | None = None,
    **placing: Any,
) -> tuple[PreTrainedModel, BlockList]:
    """A model's weights without those that `trim` leaves no place for; frozen, in evaluation mode.

    A classifier's head is drawn, whether the files hold one or not, and so is a pooler before it that they lack; what
    is returned names both.

    Args:
        directory: where configuration and weights are.
        dtype: what to hold weights in; `auto`: as they are stored.
        trim: given the model without weights, takes out of it or changes what it must, and finds its blocks.
        config: the configuration, where it is not that of the directory.
        head: makes it a classifier.
        placing: how weights are quantised as they are read, and onto which device, as `from_pretrained` takes it.

    Raises:
        CutError, ModelError: as `load_ends`.
    """
    config = config or load_config(directory)
    if head is not None:
        head.told(config := deepcopy(config))
    if (directory / PEFT_SETTINGS).exists():
        raise ModelError(
            f"{directory} holds adapter_config.json, which is no part of a model; move the adapter elsewhere"
        )
    found: list[BlockList] = []
    family: Any = class_of(config, classifies=head is not None)

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
    model.__class__ = family
    new = modules_anew(model, report["missing_keys"]) if reads_both_ways(config) or head is not None else ()
    _check_complete(directory, report, new)
    if head is not None:
        draw(model, new, head.seed)
    return model.requires_grad_(False).eval(), replace(found[0], new=new)


def _check_complete(directory: Path, report: dict[str, Any], new: Collection[str]) -> None:
    ours = tuple(f"{name}." for name in new)
    mismatched = [key for key in report["mismatched_keys"] if not key[0].startswith(ours)]
    if mismatched:
        name, stored, due = min(mismatched)
        raise ModelError(
            f"{directory} holds {name} as {list(stored)} where its config.json needs {list(due)}; get both anew"
        )
    missing = [key for key in report["missing_keys"] if not key.startswith(ours)]
    if missing:
        raise ModelError(f"{directory} lacks {len(missing)} weights of this side, such as {min(missing)}")


@contextmanager
def _told_in_one_line(what: str) -> Iterator[None]:
    """Let our own errors through, which say better what is wrong, and turn those of `transformers` into one line."""
    try:
        yield
    except IsthmusError:
        raise
    except (*UNREADABLE, MemoryError) as error:
        if _lacks_memory(error):
            raise ModelError(f"{what}: it takes more memory than is left here; free some, or give it more") from None
        kind = "" if isinstance(error, OSError | ValueError | StrictDataclassError) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())[:200]
        raise ModelError(f"{what} ({reason}); save or fetch the model anew") from None


def _lacks_memory(error: BaseException) -> bool:
    """Whether it is no fault of the files: of allocators, torch's for the processor tells so in words alone."""
    of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == ENOMEM
    return of_memory or os.strerror(ENOMEM) in str(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
