"""What a stage is told when it begins.

Knows names and numbers; a replica passes it on, and starts without the libraries for tensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.cut import Cut


@dataclass(frozen=True)
class StagePlan:
    """What a stage holds: parts of the cuts offered, each a cut itself, and how it computes."""

    model: Path
    parts: tuple[Cut, ...]
    dtype: str
    device: str
    quantize: Literal["int8", "nf4"] | None
    activation_budget: int
    threads: int | None
