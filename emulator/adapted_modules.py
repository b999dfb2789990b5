"""Which modules of a model an adapter's settings name: worked out here, so that peft is given exact names alone.

Knows a model's modules and peft's rules for names; knows no files and no tensors. A pattern that a stranger wrote may
take forever to match, so only names and ends of names are taken.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from emulator.lora_settings import shown
from emulator.merge_settings import MOST_PATTERNS, check_name
from emulator.outline import path_of
from isthmus.adapter_files import PEFT_SETTINGS
from isthmus.errors import BundleError
from isthmus.linears import is_linear

ALL_LINEAR = "all-linear"
"""peft's word for every linear module but the output layer."""


@dataclass(frozen=True)
class AdaptedModules:
    """Names from the model's root.

    Attributes:
        targets: modules that the method itself adapts.
        saved: modules that were trained whole.
        feedforward: of IA3: targets whose input is scaled.
        rows: rows of the embedding that were trained.
        untied: the output layer or the embedding is adapted without the other, whose matrix it may share.
        widest: the largest dimension of a target's weight.
    """

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    feedforward: tuple[str, ...]
    rows: tuple[int, ...]
    untied: bool
    widest: int

    @classmethod
    def find(cls, model: PreTrainedModel, names: Mapping[str, Any]) -> "AdaptedModules":
        """Find them as peft would.

        Args:
            model: may be without weights.
            names: fields of an adapter's settings that name modules or rows, as they came.

        Raises:
            BundleError: one names no module, or is a pattern; or rows are of another module than the embedding.
        """
        try:
            return cls._find(model, names)
        except ValueError as error:
            reason = str(error)
        raise BundleError(f"{PEFT_SETTINGS} is refused ({reason}): have it saved with names of this model's modules")

    @classmethod
    def _find(cls, model: PreTrainedModel, names: Mapping[str, Any]) -> "AdaptedModules":
        modules = {name: module for name, module in model.named_modules() if name}
        stem = path_of(model, model.get_input_embeddings())
        head = path_of(model, model.get_output_embeddings())  # which a classifier has none of
        ends = tuple(_listed(names, "modules_to_save"))
        saved = tuple(name for name in modules if ends and name.endswith(ends))
        _refuse_nested(saved)
        targets = tuple(
            name
            for name in _targets(names, {name: is_linear(module) and name != head for name, module in modules.items()})
            if not _is_under(name, saved)
        )
        inner = tuple(_listed(names, "feedforward_modules"))
        rows = _rows(names, stem, targets, getattr(modules[stem], "num_embeddings", 0))
        whole = {*targets, *saved} if "token_indices" not in names else set()
        ends_whole = bool({stem, head} & whole)
        if ends_whole and rows:
            raise ValueError("it trained rows of the embedding, and the embedding or the output layer besides")
        return cls(
            targets,
            saved,
            tuple(name for name in targets if inner and name.endswith(inner)),
            rows,
            ends_whole and bool(head),
            max((max(one.shape) for name in targets for one in modules[name].parameters(recurse=False)), default=0),
        )

    def told(self, names: Mapping[str, Any]) -> dict[str, Any]:
        """What peft is told instead of what came."""
        told: dict[str, Any] = {"target_modules": list(self.targets)}
        if self.saved:
            told["modules_to_save"] = list(self.saved)
        if "feedforward_modules" in names:
            told["feedforward_modules"] = list(self.feedforward)
        for field in ("token_indices", "trainable_token_indices"):
            if field in names:
                told[field] = list(self.rows)
        return told


def _listed(names: Mapping[str, Any], field: str) -> list[str]:
    given = names.get(field, [])
    if not isinstance(given, list):
        raise ValueError(f"{field} is {shown(given)}, a pattern")  # noqa: TRY004 - of a file, not of a caller
    for one in given:
        check_name(field, one)
    return given


def _targets(names: Mapping[str, Any], linear: Mapping[str, bool]) -> Iterator[str]:
    """Targets among a model's modules, each of which is linear or not."""
    given = names.get("target_modules")
    if isinstance(given, str) and given.lower() == ALL_LINEAR:
        wanted = {name for name, is_one in linear.items() if is_one}
    elif isinstance(given, str) and given in linear:
        wanted = {given}
    else:
        wanted = set(_listed(names, "target_modules"))
    unwanted, layers = set(_listed(names, "exclude_modules")), _Layers.of(names)
    found = False
    for name in linear:
        if not _ends_in(name, unwanted) and (name in wanted or (_ends_in(name, wanted) and layers.have(name))):
            found = True
            yield name
    if not found:
        raise ValueError("target_modules names no module of this model")


@dataclass(frozen=True)
class _Layers:
    """The blocks that ends of names are looked for in; None: all."""

    numbers: frozenset[int] | None
    lists: tuple[str, ...]

    @classmethod
    def of(cls, names: Mapping[str, Any]) -> "_Layers":
        given, lists = names.get("layers_to_transform"), names.get("layers_pattern", [])
        numbers: list[Any] = given if isinstance(given, list) else [given]
        if given in (None, []):
            return cls(None, ())
        if not all(isinstance(one, int) for one in numbers):
            raise ValueError(f"layers_to_transform is {shown(given)}")
        lists = [lists] if isinstance(lists, str) and lists else lists or []
        if len(lists) > MOST_PATTERNS:
            raise ValueError("layers_pattern names more lists of blocks than models have")
        patterns = [rf"(?:^|.*?\.){re.escape(one)}" for one in _listed({"layers_pattern": lists}, "layers_pattern")]
        return cls(frozenset(numbers), tuple(patterns) or (r".*?\.[^.]*",))

    def have(self, name: str) -> bool:
        if self.numbers is None:
            return True
        found = next(filter(None, (re.match(rf"{one}\.(\d+)\.", name) for one in self.lists)), None)
        return found is not None and int(found[1]) in self.numbers


def _rows(names: Mapping[str, Any], stem: str, targets: Collection[str], most: int) -> tuple[int, ...]:
    given = names.get("token_indices", names.get("trainable_token_indices", []))
    if "token_indices" in names and set(targets) != {stem}:
        raise ValueError(f"it trained rows of other modules than {stem}")
    if isinstance(given, dict):
        if len(given) != 1 or not all(_ends_in(stem, {name}) for name in given):
            raise ValueError(f"it trained rows of other modules than {stem}")
        given = next(iter(given.values()))
    if not isinstance(given, list) or not all(type(one) is int and 0 <= one < most for one in given):
        raise ValueError(f"the rows that it trained are not all of the embedding's {most}")
    if len(set(given)) < len(given):
        raise ValueError("it trained a row of the embedding twice")
    return tuple(given)


def _ends_in(name: str, ends: Collection[str]) -> bool:
    """Whether a name is one of others, or ends in one after a dot."""
    parts = name.split(".")
    return any(".".join(parts[first:]) in ends for first in range(len(parts)))


def _is_under(name: str, outer: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:last]) in outer for last in range(1, len(parts) + 1))


def _refuse_nested(saved: Collection[str]) -> None:
    for name in saved:
        if _is_under(name.rpartition(".")[0], saved):
            raise ValueError(f"modules_to_save names {shown(name)} and what it is in")
