"""Floating-point operations of a span's passes, and of what stands at its ports.

Knows blocks, shapes and which ports take part; knows no sessions. What a cloud node counts and what a plan foresees are
the same functions.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from isthmus.blocks import injecting, run_blocks
from isthmus.ledger.flops import ModelFlops, count


def count_span(model: Any, blocks: nn.ModuleList, dtype: torch.dtype) -> ModelFlops:
    """Both passes of the blocks of a model on the meta device, each row's input gradient included.

    Args:
        model: has the hooks of `isthmus.blocks.inject_at` and `capture_at`.
        blocks: its own.
        dtype: what is computed in.
    """
    size = model.base_model.config.get_text_config().hidden_size

    def run(tokens: int, _: int) -> torch.Tensor:
        hidden_BTD = torch.empty(1, tokens, size, dtype=dtype, device="meta", requires_grad=True)
        with injecting(hidden_BTD) as captured:
            run_blocks(model.base_model, blocks, hidden_BTD.detach(), cache=DynamicCache())
        return captured[0]

    return count(run)


def depth(span: range, ports: Iterable[int] | None, below: bool) -> float:
    """The share of a span's blocks that a backward goes through: all, or those down to the lowest with a port.

    Args:
        span: the blocks.
        ports: blocks that have one; None: the session has no ports that answer.
        below: the gradient of the span's input is wanted.
    """
    if below or ports is None:
        return 1.0
    end = span[-1] + 1
    return (end - min(ports, default=end)) / len(span)


def taps(positions: int, hidden_size: int, width: int) -> int:
    """Of reducing hidden states to taps that are `width` wide together."""
    return 2 * positions * hidden_size * width


def parked(positions: int, values: int) -> int:
    """Of adding, in one pass, what parked adapters of so many parameters give."""
    return 2 * positions * values


def answer_forward(tokens: int, down: int, up: int) -> int:
    """Of an adapter that answers at a port for so many tokens, its matrices having `down` and `up` values."""
    return 2 * tokens * (down + up)


def answer_backward(tokens: int, down: int, up: int, wanted: bool) -> int:
    """As `answer_forward`, of the gradients of both matrices and, where it is `wanted`, of the input."""
    return 2 * tokens * (2 * up + down + (down if wanted else 0))
