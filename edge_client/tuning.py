"""What trains: adapters of `peft` on the ends, or the ends' own biases or weights; and how they are kept.

Knows the model's modules and peft; knows no data, no optimizer and no wire.
"""

import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edge_client.dropout import SeededDropout
from edge_client.port_adapters import ADAPTER
from edge_client.side import SideShape, attach_side
from isthmus import bundle
from isthmus.adapter_files import OWN_WEIGHTS, PEFT_WEIGHTS
from isthmus.blocks import BlockList, PassThrough
from isthmus.cut import Cut
from isthmus.durable import DRAFT, sync
from isthmus.errors import BundleError, UsageError
from isthmus.linears import Site, linears_in
from isthmus.training.outputs import select_outputs

PeftType = Literal["lora", "bitfit", "full", "side"]
HEAD = "lm_head"
"""Targets may name the output layer so, whatever the family calls it."""

ALL_LINEAR = "all-linear"
"""Targets may name every linear module of the blocks that train so, as in peft."""


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
    kind: PeftType
    rank: int | None
    initial: dict[str, torch.Tensor]  # values before training, where training changes the model's own weights
    side: SideShape | None = None
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
        if self.kind != "lora":
            return sum(int((self.trainable[name] != value).sum()) for name, value in self.initial.items())
        layers = [module for module in self.model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        return sum(_changed_by_lora(layer) for layer in layers)

    @torch.no_grad()
    def load(self, values: dict[str, torch.Tensor]) -> None:
        """Set the trainable parameters.

        Raises:
            BundleError: the names or shapes are not this tuning's.
        """
        if values.keys() != self.trainable.keys():
            odd = sorted(values.keys() ^ self.trainable.keys())[0]
            raise BundleError(f"the saved adapter is for other modules: {odd} is only on one side")
        for name, value in values.items():
            if value.shape != self.trainable[name].shape:
                raise BundleError(f"the saved {name} has shape {tuple(value.shape)}; the model's is another")
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


@torch.no_grad()
def _changed_by_lora(layer: Any) -> int:
    weight = layer.get_base_layer().weight
    return int((weight + layer.get_delta_weight(ADAPTER).to(weight.dtype) != weight).sum())


@dataclass(frozen=True)
class Placement:
    """What trains and where.

    Attributes:
        kind: `lora`, `bitfit` (biases of the ends' blocks), `full` (all weights of the ends' blocks) or `side` (a side
            network fed by taps).
        rank: LoRA's r.
        alpha: LoRA's scale times r.
        targets: last names of the linear modules that get an adapter; `lm_head` is the output layer, `all-linear`
            every linear module of the blocks that train. None: the family's usual ones, or the output layer where the
            edge has no block.
        seed: of the adapter's initial values.
        only_top: nothing below the span trains.
        side: of `side` alone: the side network's shape.
        in_span: modules of the span's blocks get adapters too.
        dropout: share of an adapter's input that is dropped in training.
    """

    kind: PeftType
    rank: int
    alpha: float
    targets: list[str] | None
    seed: int
    only_top: bool = False
    side: SideShape | None = None
    in_span: bool = False
    dropout: float = 0.0


def attach(model: PreTrainedModel, found: BlockList, cut: Cut, placement: Placement) -> Tuning:
    """Make the ends trainable; `model` is the ends, or the whole model with the same placement.

    Raises:
        UsageError: nothing would train, or a target is nowhere in the ends.
    """
    blocks, kind = len(found.blocks), placement.kind
    if placement.side is not None:
        return _attach_side(model, found, cut, placement.side, placement.seed)
    ends = list(cut.above(blocks)) if placement.only_top else cut.ends(blocks)
    if kind == "lora":
        tuning = _attach_lora(model, found, list(range(blocks)) if placement.in_span else ends, placement)
        return _with_ports(tuning, found, cut) if placement.in_span else tuning
    if placement.targets is not None:
        raise UsageError(f"--targets goes with --peft lora; {kind} trains the ends' blocks")
    trainable = {}
    for number in ends:
        for name, parameter in found.blocks[number].named_parameters():
            if kind == "full" or name.rpartition(".")[2] == "bias":
                parameter.requires_grad_(True)
                trainable[f"{found.path}.{number}.{name}"] = parameter
    if not trainable:
        why = "these blocks have no biases" if ends else "the edge holds no blocks there with this cut"
        raise UsageError(f"--peft {kind} trains nothing here: {why}; use --peft lora")
    initial = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    return Tuning(model, model, trainable, kind, None, initial)


def _attach_side(model: PreTrainedModel, found: BlockList, cut: Cut, shape: SideShape, seed: int) -> Tuning:
    whole = not any(isinstance(block, PassThrough) for block in found.blocks)
    trainable = attach_side(model, found, cut, shape, seed, here=whole)
    return Tuning(model, model, trainable, "side", None, {}, shape)


def _attach_lora(model: PreTrainedModel, found: BlockList, ends: list[int], placement: Placement) -> Tuning:
    names = _target_modules(model, found, ends, placement.targets)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=placement.rank,
        lora_alpha=placement.alpha,
        lora_dropout=placement.dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
    )
    torch.manual_seed(placement.seed)
    adapted = peft.get_peft_model(model, config)
    select_outputs(model)  # the output layer may be inside an adapter now
    if placement.dropout:
        for name in names:
            model.get_submodule(name).lora_dropout[ADAPTER] = SeededDropout(placement.dropout, name)
    # peft shortens long lists to what is unique in this model; in the whole one that would match every block.
    adapted.peft_config[ADAPTER].target_modules = set(names)
    trainable = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    return Tuning(adapted.eval(), model, trainable, "lora", placement.rank, {})


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


def span_targets(model: PreTrainedModel, found: BlockList, cut: Cut, targets: list[str] | None) -> list[Site]:
    """The linear modules of the span that get an adapter, in the order of the blocks and of their names.

    Raises:
        UsageError: there are none.
    """
    numbers = list(cut.span(len(found.blocks)))
    sites = []
    for name in _target_modules(model, found, numbers, targets):
        if name.startswith(f"{found.path}."):
            number, _, module = name.removeprefix(f"{found.path}.").partition(".")
            sites.append((int(number), module))
    if not sites:
        raise UsageError("--method dlora trains modules of blocks on the cloud; name one in --targets, such as q_proj")
    return sorted(sites)


def _target_modules(model: PreTrainedModel, found: BlockList, ends: list[int], targets: list[str] | None) -> list[str]:
    """Exact names, so that plain peft finds the same modules in the whole model and nowhere else."""
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if targets is None:
        usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        if usual is None and ends:
            raise UsageError(f"no usual targets are known for {model.config.model_type}; name them with --targets")
        targets = list(usual or []) if ends else [HEAD]
    names = []
    for target in targets:
        linear = [
            f"{found.path}.{number}.{name}"
            for number in ends
            for name in linears_in(found.blocks[number])
            if target in (name.rpartition(".")[2], ALL_LINEAR)
        ]
        if target == HEAD:
            linear.append(head)
        if not linear:
            raise UsageError(f"target {target!r} is no linear module of the blocks that train; {_known(found, ends)}")
        names.extend(linear)
    return sorted(set(names))


def _known(found: BlockList, ends: list[int]) -> str:
    known = {name.rpartition(".")[2] for number in ends[:1] for name in linears_in(found.blocks[number])}
    return f"known are {', '.join(sorted(known | {HEAD, ALL_LINEAR}))}"


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
        config, dropped = tuning.model.peft_config[ADAPTER], tuning.ports.keys() - tuning.alive
        config.base_model_name_or_path = model
        every = config.target_modules
        config.target_modules = every - {tuning.ports[port].module for port in dropped}
        kept = tuning.without(dropped)
        values = {name: value for name, value in tuning.values().items() if name in kept}
        tuning.model.save_pretrained(directory, save_embedding_layers=False, state_dict=values)
        config.target_modules = every
        (directory / "README.md").unlink(missing_ok=True)  # a template for the hub, full of blanks
    else:
        save_file(tuning.values(), directory / OWN_WEIGHTS)
        about = {"method": tuning.kind, **(vars(tuning.side) if tuning.side is not None else {})}
        bundle.write(directory, "adapter", model_digest, str(cut), about, key)


def load_adapter(tuning: Tuning, directory: Path, signer: Ed25519PublicKey | None) -> None:
    """Read what `save_adapter` wrote into a tuning of the same shape; a bundle must be of `signer` if one is given.

    Raises:
        BundleError: it is missing, damaged or of another shape.
    """
    if tuning.kind == "lora":
        values = _read(directory / PEFT_WEIGHTS)
        # peft leaves the adapter's name out of its files
        tuning.load_alive({_with_adapter_name(name): value for name, value in values.items()})
        return
    bundle.verify(directory, signer)
    tuning.load(_read(directory / OWN_WEIGHTS))


def _with_adapter_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.{ADAPTER}.{last}"


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        values: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    return values
