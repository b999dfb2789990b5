"""Whether a family that nobody has tried can be cut: a small random model of it, whole and cut, must agree.

Knows configurations and how a span is run; reads no weights and speaks to nobody.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cloud_node.span import Span
from isthmus.architectures import class_of, reads_both_ways, shortened
from isthmus.blocks import BlockList, call_context, find_blocks, narrowed, stand_for, watch_owner
from isthmus.cut import Cut
from isthmus.errors import CutError
from isthmus.hollow import hollow_out
from isthmus.load import UNREADABLE
from isthmus.rows import Rows, pack, pad, rows_of_batch

log = logging.getLogger(__name__)

TRIED = frozenset(
    {
        "bert",
        "bloom",
        "distilbert",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "gptj",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "roberta",
        "smollm3",
        "vit",
    }
)
"""Model types that the tests cut everywhere and compare with the whole model."""

ENCODERS = frozenset({"bert", "distilbert", "roberta", "vit"})
"""Of them, those whose tokens see those behind them: the tests do not cut their decoders."""

BLOCKS, CUT, VOCABULARY = 4, Cut(1, 1), 64
LENGTHS = (7, 4)
CLOSE = 0.01
"""Of what leaving the span out would change: how far apart whole and cut may be."""


def check_family(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Try a family out that is not among `TRIED`: four of its blocks, as wide as they are, with random weights.

    Args:
        config: of the model that is to be cut.
        dtype: what to try it in.

    Raises:
        CutError: cut, the family cannot be run, or computes something else than whole.
    """
    family = config.model_type
    if family in TRIED and reads_both_ways(config) == (family in ENCODERS):
        return
    try:
        apart, matters = _apart(shortened(config, BLOCKS, VOCABULARY), dtype)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:120]
        raise CutError(f"{family} cannot be cut ({reason}); {_remedy()}") from None
    if not apart <= CLOSE * matters:
        raise CutError(
            f"{family} cannot be cut: a small model of it computes something else cut than whole; {_remedy()}"
        )
    log.info("%s is not among the families that are tested; a small model of it gives the same cut as whole", family)


def _remedy() -> str:
    return f"use one of {', '.join(sorted(TRIED))}"


def _apart(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[float, float]:
    """How far what is cut is from the whole, and how far it would be without the span; norms of logits' differences."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = class_of(config)(config).to(dtype).requires_grad_(False).eval()
    found = find_blocks(whole)
    span, ends = CUT.span(BLOCKS), CUT.ends(BLOCKS)
    cut, cut_found = narrowed(whole, found, ends)
    without, _ = narrowed(whole, found, ends)
    watch_owner(cut_found.owner)
    bare, bare_found = narrowed(whole, found, span)
    hollow_out(bare, bare_found)
    served = Span(bare, bare_found, CUT)
    cut_found.blocks[CUT.bottom] = _Here(served, cut_found)
    apart, matters = 0.0, 0.0
    if not reads_both_ways(config):
        apart = _apart_by_parts(served, config.get_text_config().hidden_size)
    for mask_BT in _masks():
        theirs, ours, lacking = (_outputs(model, mask_BT) for model in (whole, cut, without))
        apart, matters = apart + float((ours - theirs).norm()), matters + float((lacking - theirs).norm())
    return apart, matters


@torch.no_grad()
def _outputs(model: PreTrainedModel, mask_BT: torch.Tensor) -> torch.Tensor:
    """Logits of the real tokens, or an encoder's hidden states: [N, V]; of pictures those of all their parts."""
    if model.main_input_name == "pixel_values":
        size, draws = model.config.image_size, torch.Generator().manual_seed(0)
        pixels_BCHW = torch.randn(2, model.config.num_channels, size, size, generator=draws).to(model.dtype)
        found: torch.Tensor = model(pixels_BCHW)[0]
        return found.flatten(0, 1).float()
    ids_BT = torch.arange(1, 1 + mask_BT.numel()).view(mask_BT.shape) * mask_BT
    more = {} if reads_both_ways(model.config) else {"use_cache": False}
    found = model(ids_BT, attention_mask=mask_BT, **more)[0][mask_BT.bool()]
    return found.float()


@torch.no_grad()
def _apart_by_parts(span: Span, width: int) -> float:
    """How far a row run in two parts with a cache is from the same row run at once."""
    hidden_ND = torch.randn(6, width, generator=torch.Generator().manual_seed(0)).to(span.dtype)
    first_ND, state = span.decode(hidden_ND[:4], Rows((4,), (0,)), None)
    second_ND, _ = span.decode(hidden_ND[4:], Rows((2,), (4,)), state)
    return float((torch.cat([first_ND, second_ND]) - span.forward(hidden_ND, Rows((6,), (0,)))).float().norm())


def _masks() -> list[torch.Tensor]:
    """Two rows padded on the right, and on the left."""
    right_BT = torch.stack([(torch.arange(max(LENGTHS)) < length).long() for length in LENGTHS])
    return [right_BT, right_BT.flip(1)]


class _Here(nn.Module):
    """The span in this process, given and giving what crosses the wire."""

    def __init__(self, span: Span, found: BlockList) -> None:
        super().__init__()
        stand_for(self, found.blocks[CUT.bottom])
        self._run, self._found = span.forward, found

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        context, shape = call_context(), (hidden_states.shape[0], hidden_states.shape[1])
        rows, index_N = rows_of_batch(shape, context.attention_mask_BT, context.position_ids_BT)
        return self._found.result(pad(self._run(pack(hidden_states, index_N), rows), index_N, shape))
