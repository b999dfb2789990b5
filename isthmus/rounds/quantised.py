"""Named float32 tensors as one vector of integers mod 2^32, and the average of a sum of such.

Knows numbers; knows no keys and no wire. With n edges a value is at most clip·2^k, k chosen so that n times that is
below 2^31: no sum can wrap.
"""

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.errors import RunError, UsageError, WireError
from isthmus.rounds.limits import LARGEST_CLIP, MOST_EDGES

HALF = 1 << 31
MOST_VALUES = 1_000_000
"""In a submission: it is one message."""

Vector = NDArray[np.uint32]


def layout_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """SHA-256 of names and shapes, in the names' order."""
    said = "\n".join(f"{name} {tuple(tensors[name].shape)}" for name in sorted(tensors))
    return hashlib.sha256(said.encode()).digest()


def digest_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """SHA-256 of the values as float32, in the names' order."""
    return hashlib.sha256(_flat(tensors).numpy().astype("<f4").tobytes()).digest()


def grid(clip: float, edges: int) -> tuple[float, int]:
    """What a value is multiplied with, 2^k, and the largest integer that comes of it.

    Raises:
        UsageError: no clip of this kind, or no such number of edges, is possible.
    """
    if not (math.isfinite(clip) and 0 < clip <= LARGEST_CLIP):
        raise UsageError(f"a clip of {clip} is not possible: choose --clip above 0 and up to {LARGEST_CLIP:g}")
    if not 1 <= edges <= MOST_EDGES:
        raise UsageError(f"a round has 1 to {MOST_EDGES} edges, not {edges}: use fewer, or two names for --join")
    power = math.floor(math.log2((HALF - 1) / (clip * edges)))
    if clip * 2.0**power * edges >= HALF:  # log2 was rounded
        power -= 1
    limit = math.floor(clip * 2.0**power)
    if limit < 1:
        raise UsageError(f"a clip of {clip} leaves no value: choose a larger --clip")
    return 2.0**power, limit


def quantise(difference: Mapping[str, torch.Tensor], clip: float, edges: int) -> Vector:
    """The values, clipped and rounded, in the names' order; [values], mod 2^32.

    Raises:
        RunError: a value is not finite.
        UsageError: as `grid`.
    """
    scale, limit = grid(clip, edges)
    flat = _flat(difference).to(torch.float64)
    if not bool(torch.isfinite(flat).all()):
        raise RunError("what this run changed holds a value that is not finite; lower --lr and begin anew")
    return (flat * scale).round().clamp(-limit, limit).to(torch.int64).numpy().astype(np.uint32)


def average(total: Vector, like: Mapping[str, torch.Tensor], clip: float, edges: int) -> dict[str, torch.Tensor]:
    """The average of the vectors of `edges` edges whose sum this is, as float32 tensors of the shapes of `like`.

    Raises:
        WireError: the sum has another length, or a value that no such edges can have summed to.
        UsageError: as `grid`.
    """
    scale, limit = grid(clip, edges)
    signed = torch.from_numpy(total.astype(np.uint32).view(np.int32).astype(np.int64))
    if signed.numel() != sum(value.numel() for value in like.values()):
        raise WireError("the round's sum is of other values than this run's; ask the model owner")
    if signed.numel() and int(signed.abs().max()) > limit * edges:
        raise WireError("the round's sum is larger than its edges can have made it; an edge or the server is at fault")
    mean = (signed.to(torch.float64) / (scale * edges)).to(torch.float32)
    found, at = {}, 0
    for name in sorted(like):
        size = like[name].numel()
        found[name] = mean[at : at + size].reshape(like[name].shape)
        at += size
    return found


def clipped_share(difference: Mapping[str, torch.Tensor], clip: float) -> float:
    """The share of values that the clip makes smaller."""
    flat = _flat(difference)
    return float((flat.abs() > clip).double().mean()) if flat.numel() else 0.0


def _flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    parts = [tensors[name].detach().to("cpu", torch.float32).reshape(-1) for name in sorted(tensors)]
    return torch.cat(parts) if parts else torch.zeros(0)
