"""What `adapter_config.json` of any mergeable adapter says, read without believing it.

Knows JSON, sizes and the table of methods; knows no model and no tensors. The file comes from a stranger: of what it
holds only fields of the table, of the types that the table names, are ever told to peft.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulator.lora_settings import MAX_CONFIG_BYTES, shown
from emulator.mergeable import CHECKED, METHODS, NAMES, SAYS_NOTHING, Kind, Mergeable, fits, method_named, sizes_in
from isthmus import bundle
from isthmus.adapter_files import PEFT_SETTINGS
from isthmus.errors import BundleError

MOST_PATTERNS = 64
"""Of settings by name, where fewer modules are adapted: peft tries each on each module."""

SMALLEST_CAP = 4096
"""Sizes up to this are taken for modules of any width: shared matrices and vectors need not be narrower."""

_CLASSIFIES = ("task_type", "SEQ_CLS")
"""What a classifier's adapter says."""

RANKS = "rank_pattern"
"""Of AdaLoRA alone: which of its ranks each module has kept, by the name of what holds them."""

_PLAIN = re.compile(r"\^?[A-Za-z0-9_.]{1,500}\Z")
"""Names, and the one pattern of peft's that costs nothing: peft reads the keys of its settings as patterns."""


@dataclass(frozen=True)
class MergeSettings:
    """Settings of a known method.

    Attributes:
        peft_type: what peft calls the method.
        method: its line in the table.
        told: fields for peft's configuration, but for names.
        names: fields that name modules or rows, as they came.
        kept: of AdaLoRA: which ranks each module kept; empty where all did.
        classifies: it says that it is a classifier's.
    """

    peft_type: str
    method: Mergeable
    told: Mapping[str, Any]
    names: Mapping[str, Any]
    kept: Mapping[str, list[bool]]
    classifies: bool

    @classmethod
    def load(cls, adapter: Path) -> "MergeSettings":
        """Read an adapter's file.

        Raises:
            BundleError: it is missing, too large or no JSON, or the method or a field cannot be merged.
        """
        said = _read(adapter)
        method = method_named(said.pop("peft_type", None))
        if isinstance(method, str):
            raise BundleError(f"{adapter / PEFT_SETTINGS}: {method}")
        try:
            kept = _kept(said) if RANKS in method.set_here else {}
            told = {name: value for name, value in said.items() if _is_told(method, name, value)}
        except ValueError as error:
            raise BundleError(f"{adapter / PEFT_SETTINGS} is refused ({error}): have it trained without") from None
        peft_type = next(name for name, line in METHODS.items() if line is method)
        names = {name: value for name, value in said.items() if name in NAMES and value is not None}
        return cls(peft_type, method, {**told, **method.set_here}, names, kept, _CLASSIFIES in said.items())

    @classmethod
    def lora(cls, rank: int, alpha: float, modules: Collection[str]) -> "MergeSettings":
        """Those of plain LoRA on modules named exactly."""
        told = {"r": rank, "lora_alpha": alpha}
        return cls("LORA", METHODS["LORA"], told, {"target_modules": list(modules)}, {}, classifies=False)

    @property
    def called(self) -> str:
        """The method's name, as `edge_client train --peft` has it."""
        if self.told.get("use_dora"):
            return "dora"
        return "rslora" if self.told.get("use_rslora") else self.peft_type.lower().replace("_", "-")

    def refuse_larger(self, widest: int, count: int) -> None:
        """Return if no size is beyond what `count` modules up to `widest` values wide can need.

        Raises:
            BundleError: one is.
        """
        most = max(widest, SMALLEST_CAP)
        for name, kind in self.method.fields.items():
            largest = max(sizes_in(self.told.get(name), kind), default=0) if name in self.told else 0
            if largest > most:
                raise BundleError(
                    f"{PEFT_SETTINGS} says {name} {largest}, and the modules it adapts are {widest} wide: "
                    "have it trained with less"
                )
            given = self.told.get(name)
            if isinstance(given, dict) and len(given) > max(count, MOST_PATTERNS):
                raise BundleError(
                    f"{PEFT_SETTINGS} has {name} of {len(given)} modules, and adapts {count}: save it anew"
                )


def is_classifiers(adapter: Path) -> bool:
    """Whether an adapter's file says that it is a classifier's.

    Raises:
        BundleError: it is missing, too large or no JSON.
    """
    return _CLASSIFIES in _read(adapter).items()


def _read(adapter: Path) -> dict[str, Any]:
    with bundle.open_listed(adapter, PEFT_SETTINGS) as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise BundleError(f"{adapter / PEFT_SETTINGS} is over {MAX_CONFIG_BYTES} bytes: have it saved again")
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise BundleError(f"{adapter / PEFT_SETTINGS} holds no settings that can be read: have it saved again")
    return said


def _is_told(method: Mergeable, name: str, value: Any) -> bool:
    """Whether peft is told a field; one that is neither harmless nor known is refused."""
    if name in method.set_here:
        return False
    if name in method.fields:
        _check(name, value, method.fields[name])
        return True
    if name in CHECKED:
        _check(name, value, CHECKED[name])
    elif value and name not in NAMES | SAYS_NOTHING:
        raise ValueError(f"{shown(name)} is set, which cannot be merged")
    return False


def _check(name: str, value: Any, kind: Kind) -> None:
    if not fits(value, kind):
        raise ValueError(f"{name} is {shown(value)}{_may_be(kind)}")
    if isinstance(value, dict):
        for key in value:
            check_name(name, key)


def _may_be(kind: Kind) -> str:
    if isinstance(kind, range):
        return f", and may be {kind[0]} to {kind[-1]}"
    return "" if isinstance(kind, str) else f", and may be {', '.join(map(str, kind))}"


def check_name(field: str, name: Any) -> None:
    """Return if a name is one of modules, and no other pattern.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(name, str) or not _PLAIN.match(name):
        raise ValueError(f"{field} holds {shown(name)}, which is no name of a module")


def _kept(said: dict[str, Any]) -> dict[str, list[bool]]:
    kept = said.pop(RANKS, None) or {}
    if not isinstance(kept, dict):
        raise ValueError(f"{RANKS} is {shown(kept)}")  # noqa: TRY004 - of a file, not of a caller
    for name, mask in kept.items():
        if not isinstance(mask, list) or not all(isinstance(one, bool) for one in mask):
            raise ValueError(f"{RANKS} holds {shown(mask)} for {shown(name)}")
    return kept
