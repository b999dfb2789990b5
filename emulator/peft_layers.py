"""peft's own layers around exactly the modules that were adapted.

Knows peft and a model's modules; knows no files. What peft is given is made here from checked settings and exact
names, and what it raises over them ends in one line.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from emulator.adapted_modules import AdaptedModules
from emulator.merge_settings import MergeSettings
from isthmus.errors import BundleError, IsthmusError, ModelError
from isthmus.load import UNREADABLE

ADAPTER = "default"
"""What peft calls an adapter that nobody named."""

PREFIX = "base_model.model."
"""What peft puts before the names of a model's own modules."""


def imported_peft() -> Any:
    """The package, which merging needs and serving does not.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ModelError("the package peft is missing; run: pip install 'isthmus[cloud]'") from None
    return peft


def adapted(model: PreTrainedModel, settings: MergeSettings, modules: AdaptedModules, **how: bool) -> Any:
    """A model with peft's layers in it, `how` being peft's own flags.

    Raises:
        BundleError: peft has no such method, or cannot have it on these modules.
        ModelError: peft is not installed.
    """
    peft = imported_peft()
    if not hasattr(peft, settings.method.config):
        raise BundleError(
            f"the peft that is installed, {peft.__version__}, has no {settings.called}: install a newer one"
        )
    with told_in_one_line(settings.called):
        told = {**settings.told, **modules.told(settings.names)}
        config = getattr(peft, settings.method.config)(**told)
        return peft.get_peft_model(model, config, **how).eval()


def stored_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that peft would save of such a model, by the names that it would give them."""
    state: dict[str, torch.Tensor] = imported_peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(value.shape) for name, value in state.items()}


def fill(model: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Give such a model an adapter's values, by their names in its file.

    Raises:
        BundleError: peft has no place for one.
    """
    lost = imported_peft().set_peft_model_state_dict(model, dict(values)).unexpected_keys
    if lost:
        raise BundleError(f"peft has no place for {min(lost)}: install another version of peft")


@contextmanager
def told_in_one_line(method: str) -> Iterator[None]:
    """Let our own errors through, and turn those of peft, which settings may bring about, into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are merged already, or that share a matrix
            yield
    except IsthmusError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise BundleError(f"peft cannot merge this {method} into the model ({reason}): have it trained again") from None
