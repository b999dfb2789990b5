"""Configurations of well-known models, shipped so that plans need no hub; and any other model's, wherever it is.

Knows configuration files; reads no weights. The shipped ones say of the models' shapes what their public `config.json`
files say. Those of RoBERTa and T5, which predict no next token or are encoder-decoders, are for counting parameters.
"""

import json
from pathlib import Path
from typing import Final

from transformers import AutoConfig, PreTrainedConfig

from isthmus.errors import ModelError
from isthmus.load import UNREADABLE
from isthmus.weights import COMPANIONS

FOLDER: Final = Path(__file__).parent

LEFT_OUT: Final = ("meta-", "-v0.1")
"""What ids on the hub have beside a shipped name."""


def shipped() -> dict[str, Path]:
    """The files of the shipped configurations, by name."""
    return {path.name.removesuffix(".json"): path for path in sorted(FOLDER.glob("*.json"))}


def find(model: str) -> Path:
    """The configuration file of a model.

    Args:
        model: a model's directory, a `config.json`, an id on the hub that was fetched before, or a shipped name, such
            as llama-3-8b, by itself or as the hub has it (meta-llama/Meta-Llama-3-8B).

    Raises:
        ModelError: it is none of these.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json; give the directory of a saved Hugging Face model")
        return path / "config.json"
    if path.is_file():
        return path
    found = _fetched(model) or shipped().get(_usual(model))
    if found is None:
        raise ModelError(
            f"{model!r:.80} is no directory, config.json or model that was fetched; give one, or one of {_names()}"
        )
    return found


def beside(path: Path) -> dict[str, int] | None:
    """Sizes of the files that a bundle has beside weights, where a saved model's folder tells them: its tokenizer's."""
    if path.name != "config.json":
        return None
    return {name: (path.parent / name).stat().st_size for name in COMPANIONS if (path.parent / name).is_file()}


def read(path: Path) -> PreTrainedConfig:
    """A configuration from its file.

    Raises:
        ModelError: it cannot be read, or is of no model that `transformers` knows.
    """
    try:
        if not isinstance(json.loads(path.read_bytes()), dict):
            raise TypeError("it holds no object")
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path} is no model's configuration ({reason}); give a config.json") from None


def _fetched(model: str) -> Path | None:
    """A configuration in the hub's cache on this disk."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _usual(model: str) -> str:
    name = model.rpartition("/")[2].lower()
    for part in LEFT_OUT:
        name = name.replace(part, "")
    return name


def _names() -> str:
    return ", ".join(shipped())
