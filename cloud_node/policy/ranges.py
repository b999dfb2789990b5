"""How large hidden states get that a model makes itself: what its own ends give at each cut for tokens drawn at random.

Knows a model's files and its ends; knows no policy and no session.
"""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from isthmus.blocks import BlockList
from isthmus.cut import Cut
from isthmus.errors import IsthmusError
from isthmus.load import UNREADABLE, load_ends

log = logging.getLogger(__name__)

ROWS, TOKENS = 4, 32
LEAST: Final = 1.0
"""No model's largest value counts as less: embeddings begin small, and what is trained before them need not."""


def largest_values(directory: Path, cuts: Iterable[Cut]) -> dict[Cut, float]:
    """The largest value of a hidden state at each cut, `LEAST` at least; none for a model that cannot be run so."""
    by_cut = list(cuts)
    deepest = Cut(max(cut.bottom for cut in by_cut), 0)
    try:
        found = _largest(*load_ends(directory, deepest, torch.float32), {cut.bottom for cut in by_cut})
    except (IsthmusError, *UNREADABLE) as error:
        reason = " ".join(str(error).split())[:120]
        log.warning("hidden states are not held against a largest value: the model cannot be run for one (%s)", reason)
        return {}
    return {cut: max(LEAST, found[cut.bottom]) for cut in by_cut if cut.bottom in found}


@torch.no_grad()
def _largest(model: PreTrainedModel, found: BlockList, places: set[int]) -> dict[int, float]:
    seen: dict[int, float] = {}

    def look(place: int, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden_BTD = inputs[0] if inputs else named["hidden_states"]
        seen[place] = float(hidden_BTD.abs().max())

    for place in places:
        found.blocks[place].register_forward_pre_hook(partial(look, place), with_kwargs=True)
    _run(model)
    return {place: value for place, value in seen.items() if torch.isfinite(torch.tensor(value))}


def _run(model: PreTrainedModel) -> None:
    draws = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        shape = (ROWS, model.config.num_channels, model.config.image_size, model.config.image_size)
        model(torch.randn(shape, generator=draws))
        return
    ids_BT = torch.randint(model.config.get_text_config().vocab_size, (ROWS, TOKENS), generator=draws)
    model(ids_BT, attention_mask=torch.ones_like(ids_BT))
