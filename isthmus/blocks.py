"""The list of blocks inside a Hugging Face model, and what may stand in a block's place.

Knows module structure, attention masks and caches; knows no weights, no files and no wire.
The list keeps its real length, so that block numbers, caches and adapters keep their real names.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from copy import deepcopy
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from isthmus.architectures import reads_both_ways
from isthmus.errors import CutError


@dataclass(frozen=True)
class BlockList:
    """A model's blocks.

    Attributes:
        owner: runs them, and is called with positions and a mask of tokens.
        path: their name from the model's root.
        blocks: in order.
        returns_tuple: each returns a tuple that begins with the hidden states.
        new: modules beside them that the model's owner does not have, by name: a classifier's head.
    """

    owner: nn.Module
    path: str
    blocks: nn.ModuleList
    returns_tuple: bool
    new: tuple[str, ...] = ()

    def result(self, hidden_BTD: torch.Tensor) -> Any:
        """What a block of this family returns for these hidden states."""
        return (hidden_BTD,) if self.returns_tuple else hidden_BTD

    def replace(self, number: int) -> None:
        """Put a pass-through where block `number` is."""
        self.blocks[number] = PassThrough(number, self.returns_tuple, self.blocks[number])


def find_blocks(model: PreTrainedModel) -> BlockList:
    """Find the one list of identical blocks that a model runs in order.

    Raises:
        CutError: the model is an encoder-decoder, or no list or several lists fit.
    """
    config = model.config
    family = config.model_type
    if config.is_encoder_decoder:
        raise CutError(f"{family} is an encoder-decoder, which cannot be cut yet; use a decoder such as llama or gpt2")
    count = config.get_text_config().num_hidden_layers
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(block) for block in module}) == 1
    ]
    if len(found) != 1:
        raise CutError(
            f"{family} cannot be cut: {len(found)} lists of {count} identical blocks were found where one is needed; "
            "use a decoder built like llama or gpt2"
        )
    path, blocks = found[0]
    return BlockList(_owner(model, path), path, blocks, _returns_tuple(model, blocks))


def _owner(model: PreTrainedModel, path: str) -> nn.Module:
    """An encoder's blocks are in a part of their own, which is called with masks of another form."""
    base: nn.Module = model.base_model
    return base if reads_both_ways(model.config) else model.get_submodule(path.rpartition(".")[0])


def run_blocks(
    base: Any,
    blocks: nn.ModuleList,
    hidden_BTD: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    positions_BT: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Have a model without its head run on hidden states, in place of embedded tokens: [B, T, D] to [B, T, D].

    On the meta device a model that keeps keys and values needs a cache, for without one its masks look at values.
    A model of pictures, whose stem takes no hidden states, is not called: its blocks are, one after another.

    Raises:
        CutError: rows of pictures differ in length.
    """
    if "inputs_embeds" not in signature(base.forward).parameters:
        if mask_BT is not None:
            raise CutError("pictures of one request have as many parts each; send those of another size apart")
        for block in blocks:
            output = block(hidden_BTD)
            hidden_BTD = output[0] if isinstance(output, tuple) else output
        return hidden_BTD
    given: dict[str, Any] = {"attention_mask": mask_BT, "position_ids": positions_BT}
    if not reads_both_ways(base.config):
        given |= {"past_key_values": cache, "use_cache": cache is not None}
    result: torch.Tensor = base(inputs_embeds=hidden_BTD, **given)[0]
    return result


def route_by_token(model: nn.Module) -> Callable[[], None]:
    """Let each token run as many experts as it is routed to, which needs no values to look at; returns how to undo it.

    So does a mixture of experts run on the meta device, and cost there what it costs elsewhere.
    """
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(one): one for one in found if getattr(one, "_experts_implementation", None) is not None}
    before = [(one, one._experts_implementation) for one in configs.values()]
    for one in configs.values():
        one._experts_implementation = "batched_mm"

    def undo() -> None:
        for one, kind in before:
            one._experts_implementation = kind

    return undo


class _SeenError(Exception):
    """Ends a dry run where nothing more is to be seen."""


@torch.no_grad()
def _returns_tuple(model: PreTrainedModel, blocks: nn.ModuleList) -> bool:
    """Whether the blocks return a tuple that begins with the hidden states: seen, for what they declare is not it."""
    seen: list[bool] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple))
        raise _SeenError

    hook, training, undo = blocks[0].register_forward_hook(look), model.training, route_by_token(model)
    hidden_BTD = torch.zeros(1, 1, model.config.get_text_config().hidden_size, dtype=model.dtype, device=model.device)
    try:
        run_blocks(model.eval().base_model, blocks, hidden_BTD, cache=DynamicCache())
    except _SeenError:
        pass
    finally:
        hook.remove()
        undo()
        model.train(training)
    return seen[0]


def narrowed(
    model: PreTrainedModel, found: BlockList, keep: Collection[int], shared: Iterable[object] = ()
) -> tuple[PreTrainedModel, BlockList]:
    """A model that runs only the blocks `keep` and shares every weight with `model`, and what is named beside them."""
    memo = {id(one): one for one in (*model.parameters(), *model.buffers(), *shared)}
    twin: PreTrainedModel = deepcopy(model, memo)
    blocks = twin.get_submodule(found.path)
    narrow = replace(found, owner=_owner(twin, found.path), blocks=blocks)
    for number in set(range(len(blocks))) - set(keep):
        narrow.replace(number)
    return twin, narrow


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The key-value cache among a block's arguments: some families pass it by name, some by position."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def stand_for(module: nn.Module, block: nn.Module) -> None:
    """Give a module that stands in a block's place what some families look the block's mask up by."""
    if hasattr(block, "attention_type"):
        module.attention_type = block.attention_type


class PassThrough(nn.Module):
    """Stands in for a block that runs elsewhere: returns its input.

    Families read the cache's length from particular blocks, so a width-1 entry keeps this block's in step.
    """

    def __init__(self, number: int, returns_tuple: bool, replaced: nn.Module) -> None:
        super().__init__()
        self.number = number
        self.returns_tuple = returns_tuple
        stand_for(self, replaced)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return `hidden_states` [B, T, D] as a block of this family would."""
        cache = find_cache(args, kwargs)
        if cache is not None:
            filler = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(filler, filler, self.number)
        return (hidden_states,) if self.returns_tuple else hidden_states


@dataclass(frozen=True)
class CallContext:
    """What the block list's owner was called with: blocks themselves see only what was built from it."""

    attention_mask_BT: torch.Tensor | None = None
    position_ids_BT: torch.Tensor | None = None


_context: ContextVar[CallContext | None] = ContextVar("call_context", default=None)


def call_context() -> CallContext:
    """The context of the owner's call that is running in this thread."""
    return _context.get() or CallContext()


def watch_owner(owner: nn.Module) -> None:
    """Make `call_context` true inside `owner`'s forward, however its caller passes the arguments."""

    def context(given: dict[str, Any]) -> CallContext:
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise CutError("a split model takes a 2-D attention mask of shape (batch, tokens); others cannot cross")
        return CallContext(mask, given.get("position_ids"))

    during_calls(owner, _context, context)


def during_calls(module: nn.Module, variable: ContextVar[Any], value: Callable[[dict[str, Any]], Any]) -> None:
    """Set a context variable while `module` runs, to what `value` makes of the call's arguments by name.

    It is set anew in every call, for one that was interrupted has left its own behind.
    """
    parameters = signature(module.forward)
    rest = next((name for name, one in parameters.parameters.items() if one.kind is one.VAR_KEYWORD), "")
    entered: ContextVar[Token[Any] | None] = ContextVar("entered", default=None)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = parameters.bind_partial(*args, **kwargs).arguments
        entered.set(variable.set(value(given.pop(rest, {}) | given)))

    def leave(*_: Any) -> None:
        token = entered.get()  # None where entering was refused
        if token is not None:
            entered.set(None)
            variable.reset(token)

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave, always_call=True)


_injected: ContextVar[torch.Tensor | None] = ContextVar("injected", default=None)


def inject_at(block: nn.Module) -> None:
    """Let `injecting` replace the hidden states that reach `block`."""

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_BTD = _injected.get()
        if hidden_BTD is None:
            return args, kwargs
        if args:
            return (hidden_BTD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_BTD}

    block.register_forward_pre_hook(replace, with_kwargs=True)


_captured: ContextVar[list[torch.Tensor] | None] = ContextVar("captured", default=None)


def capture_at(block: nn.Module) -> None:
    """Let `injecting` give what leaves `block`, whatever the model makes of it afterwards."""

    def take(_: nn.Module, __: Any, output: Any) -> None:
        captured = _captured.get()
        if captured is not None:
            captured.append(output[0] if isinstance(output, tuple) else output)

    block.register_forward_hook(take)


@contextmanager
def injecting(hidden_BTD: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Run a model's blocks on `hidden_BTD` instead of what its stem computes; per thread.

    Yields what was captured: [B, T, D] each time that the block was run.
    """
    captured: list[torch.Tensor] = []
    tokens = _injected.set(hidden_BTD), _captured.set(captured)
    try:
        yield captured
    finally:
        _injected.reset(tokens[0])
        _captured.reset(tokens[1])
