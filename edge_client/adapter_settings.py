"""What `adapter_config.json` may say of a saved adapter: what this run's own settings would have written, and no more.

Knows the file and a configuration of `peft` that was made here; nothing in the file is followed, imported or given on.
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import peft

from isthmus import bundle
from isthmus.adapter_files import PEFT_SETTINGS
from isthmus.errors import BundleError

MOST_BYTES = 1 << 20

SAYS_NOTHING = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
    # of how AdaLoRA trained, and of where a prompt or a configuration of an older peft began
    | {"total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "rank_pattern", "prompt_tuning_init"}
)
"""Fields that say nothing about the model that the tensors make."""


def save_settings(config: peft.PeftConfig, directory: Path) -> None:
    """Write a configuration as peft does, but in one order.

    Raises:
        OSError: the disk refuses.
    """
    (directory / PEFT_SETTINGS).write_text(settings_text(config))


def settings_text(config: peft.PeftConfig) -> str:
    """What stands in the file."""
    return json.dumps(_as_json(config), indent=2, sort_keys=True)


def check_settings(directory: Path, config: peft.PeftConfig) -> None:
    """Compare an adapter's file with the configuration that it must have.

    Raises:
        BundleError: it is missing, too large, no JSON, or says something else.
    """
    with bundle.open_listed(directory, PEFT_SETTINGS) as file:
        check_content(file.read(MOST_BYTES + 1), directory / PEFT_SETTINGS, config)


def check_content(content: bytes, path: Path, config: peft.PeftConfig) -> None:
    """As `check_settings`, of what stood in the file at `path`.

    Raises:
        BundleError: likewise.
    """
    try:
        said = json.loads(content) if len(content) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise BundleError(f"{path} holds no settings that can be read: restore it, or train again")
    due, unless_said = _as_json(config), _defaults(config)
    for name in sorted({*said, *due} - SAYS_NOTHING):
        found = _in_order(said.get(name, unless_said.get(name)))
        if found != due.get(name) and (found or due.get(name)):
            shown = f"{name} is {found!r}"[:120]
            raise BundleError(f"{path} is of another adapter than this run's settings make: {shown}; restore it")


def _as_json(config: peft.PeftConfig) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=sorted))
    return {name: _in_order(value) for name, value in written.items()}


def _defaults(config: peft.PeftConfig) -> dict[str, Any]:
    """What a file of an older peft means where it lacks a field."""
    return {one.name: one.default for one in fields(config) if one.default is not MISSING}


def _in_order(value: Any) -> Any:
    """Names of modules come from a set, in any order."""
    of_names = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return sorted(value) if of_names else value
