"""What trains in a run and where, as its settings say.

Knows names and numbers; knows no modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_client.peft_methods import METHODS
from isthmus.core_shape import CoreShape


@dataclass(frozen=True)
class SideShape:
    """Size of a side network.

    Attributes:
        reduction: D / S: 4, 8 or 16.
        every: taps are taken from every n-th block of the span.
        width: W, values a token of a tap.
    """

    reduction: int
    every: int
    width: int


@dataclass(frozen=True)
class Placement:
    """What trains and where.

    Attributes:
        kind: a method of `edge_client.peft_methods.METHODS`.
        rank: LoRA's r, or what another method has for it; None where it has none.
        alpha: LoRA's scale times r, or what another method has for it; None where it has none.
        targets: last names of the modules that get an adapter; `lm_head` is the output layer, `all-linear`
            every linear module of the blocks that train. None: the family's usual ones, or the output layer where the
            edge has no block.
        seed: of the adapter's initial values.
        only_top: nothing below the span trains.
        side: of `side` alone: the side network's shape.
        in_span: modules of the span's blocks get adapters too.
        dropout: share of an adapter's input that is dropped in training.
        options: further fields of peft's configuration.
        steps: of the run.
        cores: those that train in place of whole adapters, where they do.
    """

    kind: str
    rank: int | None
    alpha: float | None
    targets: list[str] | None
    seed: int
    only_top: bool = False
    side: SideShape | None = None
    in_span: bool = False
    dropout: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1
    cores: CoreShape | None = None

    @property
    def virtual_tokens(self) -> int:
        """Tokens that a prompt puts in front of every row."""
        method = METHODS[self.kind]
        return int({**method.preset, **self.options}["num_virtual_tokens"]) if method.place == "prompt" else 0
