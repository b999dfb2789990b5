"""What trains: a method of `peft` on the ends, or weights of the ends' own; and how it is kept.

Knows the model's modules and peft; knows no data, no optimizer and no wire.
"""

import shutil
import warnings
from collections.abc import Collection, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edge_client.adapter_settings import check_settings, save_settings
from edge_client.allocation import Allocation
from edge_client.dropout import SeededDropout
from edge_client.peft_methods import METHODS, configure, method_of, new_config, refusals_of
from edge_client.port_adapters import ADAPTER
from edge_client.rebased import TRAINED, begins_in_weights, rebase
from edge_client.side import SideShape, attach_side
from edge_client.targets import feedforward_of, modules_for
from isthmus import bundle
from isthmus.adapter_files import OWN_WEIGHTS, PEFT_WEIGHTS
from isthmus.blocks import BlockList, PassThrough
from isthmus.cut import Cut
from isthmus.durable import DRAFT, sync
from isthmus.errors import BundleError, UsageError
from isthmus.training.outputs import select_outputs, stand_behind

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
    virtual_tokens: int = 0  # that stand in front of every row
    allocation: Allocation | None = None
    ports: dict[str, LoraPort] = field(default_factory=dict)  # by name, in the order of their sites
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
        """Of them, those of the output layer."""
        head = set(map(id, self.base.get_output_embeddings().parameters()))
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
        return sum(counts.values())

    def penalty(self) -> torch.Tensor | None:
        """What the method adds to the loss of a step; None where it adds nothing."""
        return self.allocation.penalty() if self.allocation is not None else None

    def stepped(self, step: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """Do what the method does after step `step` (0-based) of the optimizer, which was given these gradients."""
        if self.allocation is not None:
            self.allocation.allocate(step, gradients)

    def saved(self) -> dict[str, torch.Tensor]:
        """What the adapter's file holds, by the names there: what trains, and what was drawn for it."""
        if not isinstance(self.model, peft.PeftModel):
            return self.values()
        held = peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)
        dropped = {_in_file(name) for port in self.ports.keys() - self.alive for name in self.ports[port].parameters}
        return {name: value.detach().cpu().clone() for name, value in held.items() if name not in dropped}

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
        held = self.saved() if isinstance(self.model, peft.PeftModel) and not self.ports else {}
        more = sum(value.numel() for value in held.values()) > self.count
        kept = {f"{KEPT}{name}": value for name, value in held.items()} if more else {}
        return kept | (self.allocation.state() if self.allocation is not None else {})

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
            self.load_alive({_with_adapter_name(name): value for name, value in values.items()})
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


@dataclass(frozen=True)
class Placement:
    """What trains and where.

    Attributes:
        kind: a method of `edge_client.peft_methods.METHODS`.
        rank: LoRA's r, or what another method has for it; None where it has none.
        alpha: LoRA's scale times r, or what another method has for it; None where it has none.
        targets: last names of the modules that get an adapter; `lm_head` is the output layer, `all-linear`
            every linear module of the blocks that train. None: the family's usual ones, or the output layer where the
            edge has no block.
        seed: of the adapter's initial values.
        only_top: nothing below the span trains.
        side: of `side` alone: the side network's shape.
        in_span: modules of the span's blocks get adapters too.
        dropout: share of an adapter's input that is dropped in training.
        options: further fields of peft's configuration.
        steps: of the run.
    """

    kind: str
    rank: int | None
    alpha: float | None
    targets: list[str] | None
    seed: int
    only_top: bool = False
    side: SideShape | None = None
    in_span: bool = False
    dropout: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1

    @property
    def virtual_tokens(self) -> int:
        """Tokens that a prompt puts in front of every row."""
        method = METHODS[self.kind]
        return int({**method.preset, **self.options}["num_virtual_tokens"]) if method.place == "prompt" else 0


def attach(model: PreTrainedModel, found: BlockList, cut: Cut, placement: Placement) -> Tuning:
    """Make the ends trainable; `model` is the ends, or the whole model with the same placement.

    Raises:
        UsageError: nothing would train, a target is nowhere in the ends, or peft refuses.
    """
    blocks, kind = len(found.blocks), placement.kind
    if placement.side is not None:
        return _attach_side(model, found, cut, placement.side, placement.seed)
    ends = list(cut.above(blocks)) if placement.only_top else cut.ends(blocks)
    place = method_of(kind).place
    if placement.only_top and place in ("prompt", "embedding"):
        raise UsageError(f"--train top trains nothing below the span, where --peft {kind} is; leave out one of them")
    if placement.targets is not None and place not in ("linears", "norms"):
        raise UsageError(f"--targets goes with --peft lora and its like; {kind} has a place of its own")
    if place == "weights":
        return _own_weights(model, found, ends, kind)
    if placement.in_span:
        return _with_ports(_attach_peft(model, found, list(range(blocks)), placement), found, cut)
    return _attach_peft(model, found, ends, placement)


def _own_weights(model: PreTrainedModel, found: BlockList, ends: list[int], kind: str) -> Tuning:
    trainable = _head_of(model) if kind == "head" else {}
    for number in ends if kind != "head" else []:
        for name, parameter in found.blocks[number].named_parameters():
            if kind == "full" or name.rpartition(".")[2] == "bias":
                trainable[f"{found.path}.{number}.{name}"] = parameter
    if not trainable:
        why = "these blocks have no biases" if ends else "the edge holds no blocks there with this cut"
        raise UsageError(f"--peft {kind} trains nothing here: {why}; use --peft lora")
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    initial = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    return Tuning(model, model, trainable, kind, None, initial)


def _head_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The output layer's parameters, which are its own from now on."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    name = next(name for name, module in model.named_modules() if module is head)
    return {f"{name}.{last}": parameter for last, parameter in head.named_parameters()}


def _attach_side(model: PreTrainedModel, found: BlockList, cut: Cut, shape: SideShape, seed: int) -> Tuning:
    whole = not any(isinstance(block, PassThrough) for block in found.blocks)
    trainable = attach_side(model, found, cut, shape, seed, here=whole)
    return Tuning(model, model, trainable, "side", None, {}, shape)


def _attach_peft(model: PreTrainedModel, found: BlockList, ends: list[int], placement: Placement) -> Tuning:
    kind, method = placement.kind, METHODS[placement.kind]
    settings = configure(kind, placement.rank, placement.alpha, placement.dropout, placement.options, placement.steps)
    names = []
    if method.place != "prompt":
        names = modules_for(method, model, found, ends, placement.targets, everywhere=not placement.only_top)
        settings |= {"target_modules": names}
    exact = {"feedforward_modules": feedforward_of(model, names)} if method.usual == "ia3" else {}
    config = new_config(kind, settings | exact)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = isinstance(model.get_submodule(names[0]), Conv1D)
    rebased = begins_in_weights(config)
    untouched = {name: model.get_submodule(name).weight.detach().clone() for name in names} if rebased else {}
    adapted = _adapted(model, config, placement)
    if rebased:
        rebase(adapted, untouched)
    config = adapted.peft_config[ADAPTER]
    if "init_lora_weights" in vars(config):
        config.init_lora_weights = True  # how it began is past: what is saved is plain LoRA
    if placement.dropout:
        for name in names:
            model.get_submodule(name).lora_dropout[ADAPTER] = SeededDropout(placement.dropout, name)
    # peft shortens long lists to what is unique in this model; in the whole one that would match every block.
    for name, modules in ({"target_modules": names} | exact).items() if names else ():
        setattr(config, name, set(modules))
    trainable = {
        name.removesuffix(TRAINED) + (".weight" if name.endswith(TRAINED) else ""): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    allocation = Allocation(adapted, trainable) if config.peft_type == peft.PeftType.ADALORA else None
    virtual = placement.virtual_tokens
    return Tuning(
        adapted.eval(), model, trainable, kind, placement.rank, {}, virtual_tokens=virtual, allocation=allocation
    )


def _adapted(model: PreTrainedModel, config: peft.PeftConfig, placement: Placement) -> peft.PeftModel:
    torch.manual_seed(placement.seed)
    with refusals_of(placement.kind), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that peft does not know by name, and of extensions for devices
        adapted = peft.get_peft_model(model, config)
    if placement.virtual_tokens:
        stand_behind(model, placement.virtual_tokens)
    else:
        select_outputs(model)  # the output layer may be inside an adapter now
    return adapted


def _with_ports(tuning: Tuning, found: BlockList, cut: Cut) -> Tuning:
    """Name what trains inside the span by block and module."""
    ports: dict[str, LoraPort] = {}
    elsewhere = False
    for number in cut.span(len(found.blocks)):
        block = found.blocks[number]
        elsewhere = elsewhere or isinstance(block, PassThrough)
        for module, layer in block.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                stem = f"base_model.model.{found.path}.{number}.{module}"
                ports[f"{number}.{module}"] = LoraPort(
                    f"{stem}.lora_A.{ADAPTER}.weight", f"{stem}.lora_B.{ADAPTER}.weight", layer.scaling[ADAPTER]
                )
    tuning.ports, tuning.alive, tuning.elsewhere = ports, frozenset(ports), elsewhere
    return tuning


def save_adapter(
    tuning: Tuning, directory: Path, model: str, model_digest: str, cut: Cut, key: Ed25519PrivateKey
) -> None:
    """Write the adapter in the format that `Tuning.saved_as` names; an earlier one stays until this one is whole.

    Raises:
        OSError: the disk refuses.
    """
    draft = directory.with_name(f"{directory.name}{DRAFT}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    _fill(tuning, draft, model, model_digest, cut, key)
    if directory.exists():
        shutil.rmtree(directory)
    draft.rename(directory)
    sync(directory.parent)


def _fill(tuning: Tuning, directory: Path, model: str, model_digest: str, cut: Cut, key: Ed25519PrivateKey) -> None:
    if isinstance(tuning.model, peft.PeftModel):
        config = tuning.config()
        config.base_model_name_or_path = model
        save_file(tuning.saved(), directory / PEFT_WEIGHTS, metadata={"format": "pt"})
        save_settings(config, directory)
    else:
        save_file(tuning.values(), directory / OWN_WEIGHTS)
        about = {"method": tuning.kind, **(vars(tuning.side) if tuning.side is not None else {})}
        bundle.write(directory, "adapter", model_digest, str(cut), about, key)


def load_adapter(tuning: Tuning, directory: Path, signer: Ed25519PublicKey | None) -> None:
    """Read what `save_adapter` wrote into a tuning of the same shape; a bundle must be of `signer` if one is given.

    Raises:
        BundleError: it is missing, damaged or of another shape, or its settings are not this tuning's.
    """
    if not isinstance(tuning.model, peft.PeftModel):
        bundle.verify(directory, signer)
        tuning.load(_read(directory / OWN_WEIGHTS))
        return
    tuning.load_saved(_read(directory / PEFT_WEIGHTS))
    check_settings(directory, tuning.config())


def _in_file(name: str) -> str:
    """Peft leaves the adapter's name out of its files."""
    return name.replace(f".{ADAPTER}.", ".")


def _with_adapter_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.{ADAPTER}.{last}"


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        values: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    return values
