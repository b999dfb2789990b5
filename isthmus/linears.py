"""The linear modules of a model's blocks, and which of them are given the same input.

Knows modules and one dry run; knows no ports, no adapters and no wire.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from isthmus.blocks import BlockList, route_by_token, run_blocks

Site: TypeAlias = tuple[int, str]
"""A block's number and the name of a module in it."""


@dataclass(frozen=True)
class Linear:
    """A linear module.

    Attributes:
        inputs: values a token that go in.
        outputs: values a token that come out.
        transposed: its weight is [inputs, outputs], as GPT-2's are.
        shared: the modules of its block that take the same input, itself included, in the order that they run.
    """

    inputs: int
    outputs: int
    transposed: bool
    shared: tuple[str, ...]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product, in one of the two forms that Hugging Face's models use."""
    return isinstance(module, nn.Linear | Conv1D)


def linears_in(block: nn.Module) -> dict[str, nn.Module]:
    """The linear modules of a block by their names in it, in its own order; what one is made of does not count."""
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        if is_linear(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def find_linears(found: BlockList, numbers: Sequence[int], run: Callable[[], object]) -> dict[Site, Linear]:
    """The linear modules of blocks, found by running them; those that do not run once in a pass are left out.

    Args:
        found: the blocks.
        numbers: which of them.
        run: runs them all once, for instance on the meta device.
    """
    inputs: dict[int, list[tuple[str, torch.Tensor]]] = {number: [] for number in numbers}

    def note(number: int, name: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[number].append((name, args[0]))  # kept, so that no two inputs can have had one identity

    hooks = [
        module.register_forward_pre_hook(partial(note, number, name))
        for number in numbers
        for name, module in linears_in(found.blocks[number]).items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {
        (number, name): _described(module, name, inputs[number])
        for number in numbers
        for name, module in linears_in(found.blocks[number]).items()  # in their own order: adapters are made in it
        if [other for other, _ in inputs[number]].count(name) == 1
    }


def _described(module: nn.Module, name: str, seen: list[tuple[str, torch.Tensor]]) -> Linear:
    transposed = isinstance(module, Conv1D)
    if isinstance(module, nn.Linear):
        inputs, outputs = module.in_features, module.out_features  # weights may be packed
    else:
        inputs, outputs = map(int, cast("torch.Tensor", module.weight).shape)
    mine = dict(seen)[name]
    return Linear(inputs, outputs, transposed, tuple(other for other, theirs in seen if theirs is mine))


def linears_of(model: PreTrainedModel, found: BlockList, numbers: Sequence[int]) -> dict[Site, Linear]:
    """As `find_linears`, of a model on the meta device."""
    size = model.config.get_text_config().hidden_size
    embeds_BTD = torch.empty(1, 2, size, device="meta", dtype=model.dtype)

    def run() -> None:
        run_blocks(model.base_model, found.blocks, embeds_BTD, cache=DynamicCache())

    undo = route_by_token(model)
    try:
        with torch.no_grad():
            return find_linears(found, numbers, run)
    finally:
        undo()
