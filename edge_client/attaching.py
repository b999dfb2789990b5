"""Making the ends trainable: a method of `peft`, or weights of the ends' own, where a placement says.

Knows the model's modules and peft; knows no data, no files and no wire.
"""

import warnings
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edge_client.allocation import Allocation
from edge_client.attaching_cores import attach_cores
from edge_client.dropout import SeededDropout
from edge_client.peft_methods import METHODS, configure, method_of, new_config, refusals_of
from edge_client.placement import Placement, SideShape
from edge_client.port_adapters import ADAPTER
from edge_client.rebased import TRAINED, begins_in_weights, rebase
from edge_client.side import attach_side
from edge_client.targets import feedforward_of, modules_for
from edge_client.tuning import CorePort, LoraPort, Tuning
from isthmus.blocks import BlockList, PassThrough
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.training.outputs import select_outputs, stand_behind


def attach(model: PreTrainedModel, found: BlockList, cut: Cut, placement: Placement) -> Tuning:
    """Make the ends trainable; `model` is the ends, or the whole model with the same placement.

    Raises:
        UsageError: nothing would train, a target is nowhere in the ends, or peft refuses.
    """
    blocks, kind = len(found.blocks), placement.kind
    if model.base_model is model:
        raise UsageError(f"{model.config.model_type} predicts no next token; give rows with labels to classify by")
    if placement.side is not None:
        return _attach_side(model, found, cut, placement.side, placement.seed)
    ends = list(cut.above(blocks)) if placement.only_top else cut.ends(blocks)
    place = method_of(kind).place
    if placement.only_top and place in ("prompt", "embedding"):
        raise UsageError(f"--train top trains nothing below the span, where --peft {kind} is; leave out one of them")
    if placement.targets is not None and place not in ("linears", "norms"):
        raise UsageError(f"--targets goes with --peft lora and its like; {kind} has a place of its own")
    if place == "weights":
        tuning = _own_weights(model, found, ends, kind)
    elif placement.cores is not None:
        tuning = attach_cores(model, found, cut, placement.cores, placement.targets)
        tuning.trainable |= _head_of(model, found) if found.new else {}
    elif placement.in_span:
        tuning = _with_ports(_attach_peft(model, found, list(range(blocks)), placement), found, cut)
    else:
        tuning = _attach_peft(model, found, ends, placement)
    tuning.new = found.new
    return tuning


def _own_weights(model: PreTrainedModel, found: BlockList, ends: list[int], kind: str) -> Tuning:
    trainable = _head_of(model, found) if kind == "head" or found.new else {}
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


def _head_of(model: PreTrainedModel, found: BlockList) -> dict[str, nn.Parameter]:
    """A classifier's head, or the output layer's parameters, which are its own from now on."""
    if found.new:
        return {f"{new}.{name}": one for new in found.new for name, one in model.get_submodule(new).named_parameters()}
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
    config = new_config(kind, settings | exact | _classifying(found))
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = isinstance(model.get_submodule(names[0]), Conv1D)
    rebased = begins_in_weights(config)
    if model.device.type == "meta" and "init_lora_weights" in vars(config):
        config.init_lora_weights = True  # weights without values begin nothing, and shapes are the same
    untouched = {name: model.get_submodule(name).weight.detach().clone() for name in names} if rebased else {}
    adapted = _adapted(model, config, placement)
    if rebased:
        rebase(adapted, untouched)
    config = adapted.peft_config[ADAPTER]
    if found.new:
        config.modules_to_save = list(found.new)  # peft adds what other families call their heads
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


def _classifying(found: BlockList) -> dict[str, Any]:
    """What peft must know of a classifier's head, which trains with the adapter and is saved with it."""
    return {"task_type": "SEQ_CLS", "modules_to_save": list(found.new)} if found.new else {}


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
    ports: dict[str, LoraPort | CorePort] = {}
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
