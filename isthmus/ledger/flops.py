"""Floating-point operations of a model's passes, counted on the meta device.

Knows modules and shapes; runs nothing on real data. A transformer's passes over B rows of T tokens, K of which
reach the head, cost B·(a·T + b·T²) + c·K + d, whatever the model: a, b, c and d are found by counting four shapes once.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.blocks import route_by_token

SHORT, STRIDE = 8, 8
"""Row lengths of the shapes that are counted: three with this stride from the shortest; any give the same."""


@dataclass(frozen=True)
class PassFlops:
    """One pass: `per_token` and `per_pair` for blocks and attention, `per_output` for each position at the head.

    `per_call` is for what an adapter does to weights, however many rows there are.
    """

    per_token: float
    per_pair: float
    per_output: float = 0.0
    per_call: float = 0.0

    def of(self, rows: int, tokens: int, context: int | None = None, outputs: int = 0) -> int:
        """FLOPs of `rows` rows of `tokens` tokens each that attend to `context` tokens (default: themselves)."""
        pairs = tokens * (tokens if context is None else context)
        each = self.per_token * tokens + self.per_pair * pairs
        return round(rows * each + self.per_output * outputs + self.per_call)

    def __add__(self, other: "PassFlops") -> "PassFlops":
        return PassFlops(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __mul__(self, times: int) -> "PassFlops":
        return PassFlops(*(getattr(self, one.name) * times for one in fields(self)))


@dataclass(frozen=True)
class ModelFlops:
    """Both passes of a model."""

    forward: PassFlops
    backward: PassFlops

    def __add__(self, other: "ModelFlops") -> "ModelFlops":
        return ModelFlops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "ModelFlops":
        return ModelFlops(self.forward * times, self.backward * times)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same structure and flags and no storage."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    copied = deepcopy(model, memo)
    route_by_token(copied)
    return copied


def count(run: Callable[[int, int], torch.Tensor]) -> ModelFlops:
    """Count a model's passes.

    Args:
        run: given tokens T and outputs K, runs one row on the meta device and returns a tensor; its backward is
            counted when it requires a gradient. K may be 0, for models without a head.
    """
    counted = {(tokens, outputs): _count_once(run, tokens, outputs) for tokens, outputs in _shapes()}
    forward, backward = (
        _fit({shape: passes[which] for shape, passes in counted.items()}) for which in ("forward", "backward")
    )
    return ModelFlops(forward, backward)


def _shapes() -> list[tuple[int, int]]:
    return [(SHORT, 1), (SHORT + STRIDE, 1), (SHORT + 2 * STRIDE, 1), (SHORT, 2)]


def _count_once(run: Callable[[int, int], torch.Tensor], tokens: int, outputs: int) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        result = run(tokens, outputs)
    forward = counter.get_total_flops()
    if not result.requires_grad:
        return {"forward": forward, "backward": 0}
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(result, torch.ones_like(result))
    return {"forward": forward, "backward": counter.get_total_flops()}


def _fit(counts: dict[tuple[int, int], int]) -> PassFlops:
    short, long, longer = (counts[SHORT + times * STRIDE, 1] for times in range(3))
    per_output = float(counts[SHORT, 2] - short)
    # Each is d + c + a T + b T².
    per_pair = (longer - 2 * long + short) / (2 * STRIDE**2)
    per_token = (long - short) / STRIDE - per_pair * (2 * SHORT + STRIDE)
    per_call = short - per_output - per_token * SHORT - per_pair * SHORT**2
    return PassFlops(per_token, per_pair, per_output, per_call)
