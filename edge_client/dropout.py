"""Dropout whose masks are a function of seed, step, part of the batch, module and token, whoever computes when.

Knows names, counts and a mask; knows no model. So a request that is answered twice, a resumed run and the same model
in one process draw the same masks: outside `drawing` nothing is dropped.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Draw:
    """What masks are drawn for.

    Attributes:
        seed: of the run.
        step: of the run.
        part: number of the microbatch in its step.
        index_N: where the real tokens stand in the flattened padded batch; None where nothing is padded.
        positions: tokens of the padded batch.
    """

    seed: int
    step: int
    part: int
    index_N: torch.Tensor | None
    positions: int

    def generator(self, name: str) -> torch.Generator:
        """Random numbers for one module."""
        drawn_for = f"{self.seed}/{self.step}/{self.part}/{name}".encode()
        seed = int.from_bytes(hashlib.blake2b(drawn_for, digest_size=7).digest())
        return torch.Generator().manual_seed(seed)


_drawing: ContextVar[Draw | None] = ContextVar("drawing", default=None)


def present_draw() -> Draw | None:
    """What this thread draws masks for."""
    return _drawing.get()


@contextmanager
def drawing(draw: Draw | None) -> Iterator[None]:
    """Drop values in what this thread computes in here."""
    token = _drawing.set(draw)
    try:
        yield
    finally:
        _drawing.reset(token)


class SeededDropout(nn.Module):
    """Dropout (Srivastava et al., 2014) of `share` of an adapter's input, by the name of its module."""

    def __init__(self, share: float, name: str) -> None:
        super().__init__()
        self._share = share
        self._name = name

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Zero a share of the values of `hidden` [..., D], the rest scaled up; its tokens may be padded or packed."""
        draw = _drawing.get()
        if draw is None:
            return hidden
        if hidden.is_meta:
            return hidden * torch.empty_like(hidden, requires_grad=False)
        tokens = hidden.shape[:-1].numel()
        spread = draw.index_N is not None and tokens == draw.positions
        count = len(draw.index_N) if spread and draw.index_N is not None else tokens
        kept = torch.rand(count, hidden.shape[-1], generator=draw.generator(self._name)) >= self._share
        scale = kept.to(hidden.device, hidden.dtype) / (1 - self._share)
        if spread and draw.index_N is not None:
            scale = scale.new_zeros(tokens, hidden.shape[-1]).index_copy(0, draw.index_N.to(scale.device), scale)
        return hidden * scale.view(hidden.shape)

    def extra_repr(self) -> str:
        """The share."""
        return f"share={self._share}"
