"""What a model is built as to take an adapter: as it is, or as a classifier, whose head the adapter holds.

Knows models without weights, and names and shapes in files; reads no tensors and knows no settings. How many labels
there are is a stranger's word, and is bounded before a model with so many is made.
"""

from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from emulator.lora_settings import shown
from emulator.outline import Outline, shapes_under
from isthmus import bundle
from isthmus.architectures import class_of
from isthmus.blocks import find_blocks
from isthmus.classifier import FEWEST_LABELS, MOST_LABELS
from isthmus.errors import BundleError, ModelError

_ODD = 10_007
"""A prime above `MOST_LABELS`: what is so long in a head is as long as there are labels."""


@dataclass(frozen=True)
class BuiltAs:
    """The model that an adapter's names are of.

    Attributes:
        outline: of it; of the whole model, by the names of this one.
        head: shapes of a classifier's weights that the model's owner does not have, or of the output layer's.
        labels: how many a classifier tells apart; None: it is none.
    """

    outline: Outline
    head: Mapping[str, tuple[int, ...]]
    labels: int | None

    @classmethod
    def of(cls, directory: Path, whole: Outline, held: Mapping[str, tuple[int, ...]], classifies: bool) -> "BuiltAs":
        """Find out by what an adapter holds.

        Args:
            directory: of the model.
            whole: its outline.
            held: shapes of the adapter's tensors, by names from the model's root.
            classifies: the adapter says that it is a classifier's.

        Raises:
            BundleError: it must be a classifier's and holds no head of one, or one of too few or too many labels.
            CutError, ModelError: the model cannot be read, or `transformers` has no classifier of it.
        """
        own = {name for name, _ in whole.bare.named_children()}
        must_classify = classifies or not whole.head
        may_classify = must_classify or any(name.partition(".")[0] not in own for name in held)
        labels = _labels(whole.bare.config, held) if may_classify else None
        if labels is not None:
            return cls._classifier(directory, whole, labels)
        if must_classify:
            family = whole.bare.config.model_type
            why = "says that it is a classifier's" if classifies else f"this {family} has no output layer"
            raise BundleError(
                f"the adapter holds no head, and {why}: have it saved with its head, which modules_to_save must name"
            )
        return cls(whole, whole.head, None)

    @classmethod
    def _classifier(cls, directory: Path, whole: Outline, labels: int) -> "BuiltAs":
        if not FEWEST_LABELS <= labels <= MOST_LABELS:
            raise BundleError(
                f"the adapter's head tells {labels} labels apart, and may {FEWEST_LABELS} to {MOST_LABELS:,}: have it "
                "trained on other rows"
            )
        bare = _without_weights(whole.bare.config, labels)
        path = find_blocks(bare).path
        named = replace(whole, path=path, weights=shapes_under(bare, path), bare=bare)
        return cls(named, _head(bare, directory), labels)

    def refuse_headless(self, names: Collection[str]) -> None:
        """Return if tensors with these names from the model's root give each weight of a classifier's head.

        Raises:
            BundleError: one is not among them.
        """
        lacking = self.head.keys() - set(names) if self.labels is not None else set()
        if lacking:
            raise BundleError(
                f"the adapter trained {min(lacking)} not whole, and the model's owner has none: have it trained with "
                "the whole head, poolers that the model lacks included, in modules_to_save"
            )


def shapes_in(adapter: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in an adapter's file, by their names in it; nothing but its header is read.

    Raises:
        BundleError: it cannot be read, or is a link.
    """
    bundle.open_listed(adapter, name).close()  # no link to a file elsewhere
    try:
        with safe_open(adapter / name, framework="pt") as file:
            return {stored: tuple(file.get_slice(stored).get_shape()) for stored in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{adapter / name} cannot be read ({shown(str(error))}): have it submitted again") from None


def _labels(config: PreTrainedConfig, held: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many labels there are in the first tensor that is as long as there are labels."""
    bare = _without_weights(config, _ODD)
    counted = [name for name, shape in _beside(bare) if shape[:1] == (_ODD,)]
    return next((held[name][0] for name in counted if held.get(name)), None)


def _without_weights(config: PreTrainedConfig, labels: int) -> PreTrainedModel:
    config = deepcopy(config)
    config.num_labels = labels
    with torch.device("meta"):
        return class_of(config, classifies=True)(config).requires_grad_(False).eval()


def _beside(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weights outside the model that a classifier is built on."""
    for name, module in model.named_children():
        if module is not model.base_model:
            yield from ((f"{name}.{last}", tuple(one.shape)) for last, one in module.named_parameters())


def _head(model: PreTrainedModel, directory: Path) -> dict[str, tuple[int, ...]]:
    """What is beside that model, and poolers in it that the owner's files lack."""
    prefix, stored = f"{model.base_model_prefix}.", _names_in(directory)
    lacking = {
        name.rpartition(".")[0]
        for name, _ in model.named_parameters()
        if ".pooler." in name and not {name, name.removeprefix(prefix)} & stored
    }
    poolers = {n: tuple(one.shape) for n, one in model.named_parameters() if n.rpartition(".")[0] in lacking}
    return {**poolers, **dict(_beside(model))}


def _names_in(directory: Path) -> set[str]:
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                names |= set(file.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read ({shown(str(error))}); get it anew") from None
    return names
