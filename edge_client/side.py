"""The side network of ladder side-tuning: narrow blocks fed by taps of the frozen backbone, joined to its last block.

Knows taps by block number and a list of blocks; knows no wire, no data and no optimizer, and keeps nothing of a call.
Method: Sung, Cho and Bansal, "LST: Ladder Side-Tuning" (2022), arXiv:2206.06522.
Legend: B rows, T tokens, D the backbone's hidden size, S the side network's, W values a token of a tap.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel

from edge_client.placement import SideShape
from isthmus.blocks import BlockList, call_context, find_cache, stand_for, watch_owner
from isthmus.cut import Cut
from isthmus.errors import CutError, UsageError
from isthmus.ports import MAX_WIDTH, Taps, every, tap_at, tap_calls_of, tapped

TEMPERATURE = 0.1
"""Of the gates: the paper's T."""

EPSILON = 1e-6
SMALLEST_HEAD = 16
"""Values of an attention head; a narrower network has one head."""


class Entry(nn.Module):
    """Brings a tap to the side network's size; normed first, for a backbone's states have huge outliers."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=EPSILON)
        self.down = nn.Linear(width, size, bias=False)

    def forward(self, tap_BTW: torch.Tensor) -> torch.Tensor:
        """The tap as [B, T, S]."""
        weight = self.down.weight
        entered_BTS: torch.Tensor = self.down(self.norm(tap_BTW.to(weight.device, weight.dtype)))
        return entered_BTS


class Rung(nn.Module):
    """A narrow block that a tap is mixed in before: m · entered + (1 - m) · hidden with m = sigmoid(a / 0.1)."""

    def __init__(self, number: int, entry: Entry, block: nn.Module) -> None:
        """Mix in the tap of the backbone's block `number` before the narrow `block`."""
        super().__init__()
        self.number = number
        self.entry = entry
        self.gate = nn.Parameter(torch.zeros(1))
        self.block = block

    def forward(self, hidden_BTS: torch.Tensor, *, taps: Taps, **kwargs: Any) -> Any:
        """What the narrow block returns for the mixture."""
        share = torch.sigmoid(self.gate / TEMPERATURE)
        return self.block(share * self.entry(taps[self.number]) + (1 - share) * hidden_BTS, **kwargs)


class SideNetwork(nn.Module):
    """One narrow Llama block per tap, whatever the backbone's family; its result is what the backbone lacks."""

    def __init__(self, numbers: tuple[int, ...], width: int, hidden_size: int, size: int) -> None:
        """Take taps of `width` values from the blocks `numbers`, lowest first."""
        super().__init__()
        self.numbers = numbers
        self.entry = Entry(width, size)
        self.blocks = _narrow_blocks(len(numbers), size)
        for place, number in enumerate(numbers[1:], start=1):
            self.blocks.layers[place] = Rung(number, Entry(width, size), self.blocks.layers[place])
        self.up = nn.Linear(size, hidden_size, bias=False)
        nn.init.zeros_(self.up.weight)  # until it is trained the backbone is as it was

    def forward(self, taps: Taps) -> torch.Tensor:
        """What to add to the backbone's last hidden state [B, T, D].

        Raises:
            UsageError: a tap is missing.
        """
        missing = [number for number in self.numbers if number not in taps]
        if missing:
            raise UsageError(f"no tap came from block {missing[0]}; call the model whole, with the span it trains with")
        first_BTS, context = self.entry(taps[self.numbers[0]]), call_context()
        # Without a cache Hugging Face looks at masks by value, which meta tensors lack.
        cache = DynamicCache() if first_BTS.is_meta else None
        last_BTS: torch.Tensor = self.blocks(
            inputs_embeds=first_BTS,
            attention_mask=context.attention_mask_BT,
            position_ids=context.position_ids_BT,
            past_key_values=cache,
            use_cache=False,
            taps=taps,  # handed on to every block: to the rungs, and to the first, which has none
        ).last_hidden_state
        added_BTD: torch.Tensor = self.up(last_BTS)
        return added_BTD


def _narrow_blocks(count: int, size: int) -> Any:
    config = LlamaConfig(
        vocab_size=1,
        hidden_size=size,
        intermediate_size=4 * size,
        num_hidden_layers=count,
        num_attention_heads=_heads(size),
        rms_norm_eps=EPSILON,
        bos_token_id=None,
        eos_token_id=None,
    )
    blocks = LlamaModel(config)
    blocks.embed_tokens = nn.Identity()  # taps come in its place
    return blocks


def _heads(size: int) -> int:
    """The most heads of no fewer values than the smallest and of an even number, as rotary embeddings need."""
    fitting = (heads for heads in range(size // SMALLEST_HEAD, 1, -1) if size % (2 * heads) == 0)
    return next(fitting, 1)


class Joined(nn.Module):
    """The last block with a side network's result added to its own; stands at its place in the block list."""

    def __init__(self, block: nn.Module, side: SideNetwork) -> None:
        super().__init__()
        self.block = block
        self.side = side
        stand_for(self, block)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block returns for `hidden_states` [B, T, D], with the side network's part in it.

        Raises:
            CutError: the call keeps a key-value cache; a side network keeps nothing.
            UsageError: a tap is missing.
        """
        if find_cache(args, kwargs) is not None and not hidden_states.is_meta:
            raise CutError("a side network runs whole rows; generate with use_cache=False")
        output = self.block(hidden_states, *args, **kwargs)
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        joined_BTD = hidden_BTD + self.side(tapped()).to(hidden_BTD.dtype)
        return (joined_BTD, *output[1:]) if isinstance(output, tuple) else joined_BTD


def attach_side(
    model: PreTrainedModel, found: BlockList, cut: Cut, shape: SideShape, seed: int, here: bool
) -> dict[str, nn.Parameter]:
    """Join a side network to a frozen model, which stays bit for bit what it was until the network is trained.

    Args:
        model: the ends or the whole model; the network takes its dtype and device.
        found: the model's blocks; the last becomes a `Joined`.
        cut: where the span is, which the taps come from.
        shape: of the network and its taps.
        seed: of its initial values, which depend on nothing else.
        here: the span's blocks are in place and tapped here. Otherwise whoever stands for them adds to `tapped`, and
            `watch_owner` has been called.

    Returns:
        The network's parameters by name; all begin with `side.` and none depends on the backbone's family.

    Raises:
        UsageError: the shape does not fit the model.
    """
    hidden_size = model.config.get_text_config().hidden_size
    check_shape(shape, hidden_size)
    ports = every(shape.every, cut, len(found.blocks), shape.width)
    numbers = tuple(port.block for port in ports)
    side = _seeded(numbers, shape.width, hidden_size, hidden_size // shape.reduction, seed)
    for parameter in side.parameters():  # and no buffer: rotary frequencies stay exact
        parameter.data = parameter.data.to(model.dtype)
    side.to(model.device)
    if here:
        watch_owner(found.owner)
        for number in numbers:
            tap_at(found.blocks[number], number)
    tap_calls_of(found.owner, ports)
    found.blocks[-1] = Joined(found.blocks[-1], side.eval())
    return {f"side.{name}": parameter for name, parameter in side.named_parameters()}


def check_shape(shape: SideShape, hidden_size: int) -> None:
    """Refuse a shape that does not fit a model.

    Raises:
        UsageError: with what to change.
    """
    if hidden_size % (2 * shape.reduction):
        raise UsageError(f"reduction {shape.reduction} does not share the hidden size {hidden_size}; lower --reduction")
    widest = min(hidden_size, MAX_WIDTH)
    if not 1 <= shape.width <= widest:
        raise UsageError(f"a tap width of {shape.width} is outside 1 to {widest}; change --tap-width")


def _seeded(numbers: tuple[int, ...], width: int, hidden_size: int, size: int, seed: int) -> SideNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return SideNetwork(numbers, width, hidden_size, size)
