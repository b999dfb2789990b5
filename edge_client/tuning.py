"""What trains: a model with its trainable parameters, by their names in the whole model's saved adapter.

Knows the model's modules and peft; knows no data, no optimizer, no files and no wire.
"""

import warnings
from collections.abc import Collection, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from edge_client.allocation import Allocation
from edge_client.placement import SideShape
from edge_client.port_adapters import ADAPTER, CORE_OF
from isthmus.core_shape import CoreShape
from isthmus.errors import BundleError, UsageError

KEPT = "kept/"
"""How a checkpoint's names begin of what a saved adapter holds."""


@dataclass(frozen=True)
class LoraPort:
    """Of an adapter in the span: the names of its down [R, I] and up [O, R], and its scale."""

    down: str
    up: str
    scale: float

    @property
    def parameters(self) -> tuple[str, str]:
        """Both names."""
        return self.down, self.up

    @property
    def module(self) -> str:
        """The module's name from the model's root."""
        return self.down.removeprefix("base_model.model.").partition(".lora_A.")[0]


@dataclass(frozen=True)
class CorePort:
    """Of a core in the span: its name [R, R]."""

    core: str
    scale: float

    @property
    def parameters(self) -> tuple[str]:
        """Its name."""
        return (self.core,)

    @property
    def up(self) -> str:
        """What is zero as long as nothing is added."""
        return self.core

    @property
    def module(self) -> str:
        """The module's name from the model's root."""
        return self.core.removesuffix(f".{CORE_OF}.weight")


@dataclass
class Tuning:
    """A model with its trainable parameters, by their names in the whole model's saved adapter."""

    model: nn.Module  # what to call: a PeftModel or the model itself
    base: PreTrainedModel
    trainable: dict[str, nn.Parameter]
    kind: str
    rank: int | None
    initial: dict[str, torch.Tensor]  # values before training, where training changes the model's own weights
    side: SideShape | None = None
    cores: CoreShape | None = None  # of them, where they are what trains
    new: tuple[str, ...] = ()  # modules of a classifier's head, all of which train
    virtual_tokens: int = 0  # that stand in front of every row
    allocation: Allocation | None = None
    ports: dict[str, LoraPort | CorePort] = field(default_factory=dict)  # by name, in the order of their sites
    alive: frozenset[str] = frozenset()  # the ports whose adapters are part of the model
    elsewhere: bool = False  # the modules at the ports are not here

    @property
    def count(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.trainable.values())

    def without(self, ports: Collection[str]) -> dict[str, nn.Parameter]:
        """The trainable parameters but for those of some ports."""
        left_out = {name for port in ports for name in self.ports[port].parameters}
        return {name: parameter for name, parameter in self.trainable.items() if name not in left_out}

    @torch.no_grad()
    def begin_anew(self, ports: Collection[str]) -> list[str]:
        """Let adapters at ports add nothing, B being 0 again; returns their parameters' names."""
        for port in ports:
            self.trainable[self.ports[port].up].zero_()
        return [name for port in ports for name in self.ports[port].parameters]

    @property
    def head_count(self) -> int:
        """Of them, those of the output layer, or of a classifier's head."""
        output = self.base.get_output_embeddings()
        if self.new:
            return sum(
                one.numel() for name, one in self.trainable.items() if any(f".{new}." in f".{name}" for new in self.new)
            )
        head = set(map(id, output.parameters()))
        return sum(parameter.numel() for parameter in self.trainable.values() if id(parameter) in head)

    @property
    def saved_as(self) -> Literal["peft", "isthmus"]:
        """The format of `save_adapter`: peft's where peft has the method, else a signed bundle of ours."""
        return "peft" if isinstance(self.model, peft.PeftModel) else "isthmus"

    def changed(self) -> int | None:
        """Parameters of the whole model that differ once the adapter is merged; None where those are not here."""
        if self.elsewhere:
            return None
        if not isinstance(self.model, peft.PeftModel):
            return sum(int((self.trainable[name] != value).sum()) for name, value in self.initial.items())
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        counts: dict[int, int] = {}  # by parameter: the embedding's may be the output layer's too
        for layer in layers:
            counts |= _changed_by(layer)
        heads = (module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper))
        return sum(counts.values()) + sum(map(_differing, heads))

    def penalty(self) -> torch.Tensor | None:
        """What the method adds to the loss of a step; None where it adds nothing."""
        return self.allocation.penalty() if self.allocation is not None else None

    def stepped(self, step: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """Do what the method does after step `step` (0-based) of the optimizer, which was given these gradients."""
        if self.allocation is not None:
            self.allocation.allocate(step, gradients)

    def saved(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of what the adapter's file holds, by the names there."""
        return {name: value.cpu().clone() for name, value in self.held().items()}

    def held(self) -> dict[str, torch.Tensor]:
        """What the adapter's file holds, by the names there: what trains, and what was drawn for it."""
        if not isinstance(self.model, peft.PeftModel):
            return {name: one.detach() for name, one in self.without(self.ports.keys() - self.alive).items()}
        held = peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)
        dropped = {_in_file(name) for port in self.ports.keys() - self.alive for name in self.ports[port].parameters}
        return {name: value.detach() for name, value in held.items() if name not in dropped}

    def config(self) -> peft.PeftConfig:
        """Peft's configuration of the adapter as it is saved.

        Raises:
            UsageError: peft does not have the method.
        """
        if not isinstance(self.model, peft.PeftModel):
            raise UsageError(f"peft has no {self.kind}, so it has no configuration there")
        config, dropped = copy(self.model.peft_config[ADAPTER]), self.ports.keys() - self.alive
        if getattr(config, "target_modules", None):
            config.target_modules = config.target_modules - {self.ports[port].module for port in dropped}
        config.inference_mode = True
        return config

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run must know beside the trainable parameters, by names for a checkpoint."""
        kept = {name: value.cpu().clone() for name, value in self.beside().items()}
        return kept | (self.allocation.state() if self.allocation is not None else {})

    def beside(self) -> dict[str, torch.Tensor]:
        """What of the adapter's file does not train, if anything: all of the file then, by names for a checkpoint."""
        held = self.held() if isinstance(self.model, peft.PeftModel) and not self.ports else {}
        more = sum(value.numel() for value in held.values()) > self.count
        return {f"{KEPT}{name}": value for name, value in held.items()} if more else {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a `state`, among other tensors; the trainable parameters are given back after it.

        Raises:
            BundleError: it is of another adapter.
        """
        kept = {name.removeprefix(KEPT): value for name, value in state.items() if name.startswith(KEPT)}
        if kept:
            self.load_saved(kept)
        if self.allocation is not None:
            self.allocation.load(state)

    def load_saved(self, values: dict[str, torch.Tensor]) -> None:
        """Set what an adapter's file holds.

        Raises:
            BundleError: the names or shapes are not this tuning's.
        """
        if self.ports:
            own = {_in_file(name): name for name in self.trainable}
            self.load_alive({own.get(name, name): value for name, value in values.items()})
            return
        if not isinstance(self.model, peft.PeftModel):
            self.load(values)
            return
        _check_same(values, self.saved())
        peft.set_peft_model_state_dict(self.model, values)
        if self.virtual_tokens:
            self.model.peft_config[ADAPTER].inference_mode = True  # the prompt stands by itself: an encoder is not kept

    @torch.no_grad()
    def load(self, values: dict[str, torch.Tensor]) -> None:
        """Set the trainable parameters.

        Raises:
            BundleError: the names or shapes are not this tuning's.
        """
        _check_same(values, self.trainable)
        for name, value in values.items():
            self.trainable[name].copy_(value)

    def load_alive(self, values: dict[str, torch.Tensor]) -> None:
        """As `load`; ports of which there are no values are not alive, and add nothing.

        Raises:
            BundleError: as `load`.
        """
        dead = {port for port, one in self.ports.items() if not values.keys() & set(one.parameters)}
        self.begin_anew(dead)
        self.alive = frozenset(self.ports) - dead
        present = {name: self.trainable[name].detach().clone() for port in dead for name in self.ports[port].parameters}
        self.load(present | values)

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of the trainable parameters on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trainable.items()}


def _check_same(values: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    if values.keys() != own.keys():
        odd = sorted(values.keys() ^ own.keys())[0]
        raise BundleError(f"the saved adapter is for other modules: {odd} is only on one side")
    for name, value in values.items():
        if value.shape != own[name].shape:
            raise BundleError(f"the saved {name} has shape {tuple(value.shape)}; the model's is another")


@torch.no_grad()
def _changed_by(layer: Any) -> dict[int, int]:
    """How many values differ in each parameter of a module that an adapter is merged into, by the parameter's id."""
    before, merged = dict(layer.get_base_layer().named_parameters()), deepcopy(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what merging would do to the module itself
        merged.merge()
    after = dict(merged.get_base_layer().named_parameters())
    return {id(value): int((after[name] != value).sum()) for name, value in before.items()}


def _differing(head: ModulesToSaveWrapper) -> int:
    """How many values of a head that trains are not what they were."""
    pairs = zip(head.original_module.parameters(), head.modules_to_save[ADAPTER].parameters(), strict=True)
    return sum(int((before != after).sum()) for before, after in pairs)


def _in_file(name: str) -> str:
    """Peft leaves the adapter's name out of its files."""
    return name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}.", ".")
