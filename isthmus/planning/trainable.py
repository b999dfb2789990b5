"""How many parameters a method trains in a model, from the model's structure alone.

Knows modules, and what peft makes of its own configurations; knows no cut, no wire and no data. What is made stands on
the meta device, without values, so that a model of any size takes seconds and no memory.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import peft
import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from isthmus.errors import UsageError
from isthmus.head import modules_anew
from isthmus.ledger.flops import on_meta
from isthmus.planning.figures import Trained

KEYS_AND_VALUES = (("k_proj", "v_proj"), ("key", "value"), ("k", "v"))
"""What families call an attention's linear modules that make its keys and its values."""

UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What peft raises over settings that do not fit a model."""

DRAWN = frozenset({"BOFT"})
"""Methods of peft that look at values while they are made, which the meta device has none of."""


@dataclass(frozen=True)
class Prefixes:
    """Prefix tuning (Li and Liang, 2021) at every attention, a decoder's attention to its encoder included.

    AdapterHub's `adapters` makes prefixes so. peft's own, `peft.PrefixTuningConfig`, makes one for all of a model, as
    wide as its hidden states: the same in a single stack whose keys are as wide, and less in T5.

    Attributes:
        tokens: the prefix's length.
        bottleneck: width of the network that makes prefixes while they train, one for each stack and kind of
            attention; None: keys and values train themselves.
    """

    tokens: int
    bottleneck: int | None = None


Weights = Literal["bitfit", "full"]
"""Methods that train weights of the model: all its biases (BitFit; Zaken and others, 2022), or everything."""


def trainable(model: PreTrainedModel, method: peft.PeftConfig | Prefixes | Weights) -> Trained:
    """Count what a method trains in a model, which stays as it is.

    Args:
        model: built from a configuration, best on the meta device. If it classifies, its head trains along.
        method: a configuration of peft, whose task says whether there is a head; or one of those that peft lacks.

    Raises:
        UsageError: the method does not fit the model.
    """
    if isinstance(method, peft.PeftConfig):
        return _by_peft(on_meta(model), method)
    head = _head_of(model)
    rest = {name: one for name, one in model.named_parameters() if name not in head}
    match method:
        case Prefixes():
            adapter = _values_of(method, model)
        case "bitfit":
            adapter = _numbers(one for name, one in rest.items() if name.rpartition(".")[2] == "bias")
        case "full":
            adapter = _numbers(rest.values())
    return Trained(adapter, _numbers(head.values()))


def _by_peft(twin: nn.Module, config: peft.PeftConfig) -> Trained:
    twin.requires_grad_(False)
    where = "cpu" if config.peft_type in DRAWN else "meta"
    with torch.device(where), _told_in_one_line(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that peft does not know by name
        adapted = peft.get_peft_model(twin, deepcopy(config))  # it writes into what it is given
    saved = [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
    whole = {id(parameter) for module in saved for parameter in module.parameters()}
    training = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    head = _numbers(parameter for parameter in training if id(parameter) in whole)
    return Trained(_numbers(training) - head, head)


def _head_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters beside the base model, by name, where they are not an output layer."""
    names = modules_anew(model, ()) if model.get_output_embeddings() is None else ()
    return {f"{name}.{last}": one for name in names for last, one in model.get_submodule(name).named_parameters()}


def _values_of(prefixes: Prefixes, model: nn.Module) -> int:
    attentions = _attentions(model)
    if not attentions:
        known = ", ".join("/".join(pair) for pair in KEYS_AND_VALUES)
        raise UsageError(
            f"prefixes go before keys and values, and no attention here has {known}; choose another method"
        )
    total = 0
    for alike in attentions.values():
        width, values = alike[0][0].in_features, sum(one.out_features for pair in alike for one in pair)
        if prefixes.bottleneck is None:
            total += prefixes.tokens * values
        else:
            total += prefixes.tokens * width + (width + 1) * prefixes.bottleneck + (prefixes.bottleneck + 1) * values
    return total


def _attentions(model: nn.Module) -> dict[str, list[tuple[nn.Linear, nn.Linear]]]:
    """What makes keys and values in each attention, by stack and kind: its path without the blocks' numbers."""
    found: dict[str, list[tuple[nn.Linear, nn.Linear]]] = defaultdict(list)
    for path, module in model.named_modules():
        inside = dict(module.named_children())
        kind = ".".join(part for part in path.split(".") if not part.isdecimal())
        for names in KEYS_AND_VALUES:
            keys, values = map(inside.get, names)
            if isinstance(keys, nn.Linear) and isinstance(values, nn.Linear):
                found[kind].append((keys, values))
    return found


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UsageError(f"peft refuses these settings for this model: {reason}; name other modules or sizes") from None
