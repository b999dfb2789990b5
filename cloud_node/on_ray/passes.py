"""What crosses between the front end and a stage: a pass, its tensors, what came of it, and questions at ports.

Knows dataclasses and NumPy arrays, which Ray moves without copies; runs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from cloud_node.engine import Place, Work
from isthmus.attached import Values
from isthmus.errors import IsthmusError
from isthmus.linears import Site
from isthmus.round_trips import Parked, Question
from isthmus.rows import Rows

Kind: TypeAlias = Literal["forward", "backward", "decode", "park", "attach", "gradients"]


@dataclass(frozen=True)
class Carried:
    """A tensor on its way between processes: bfloat16, which NumPy has not, goes as its bits."""

    values: "np.ndarray[Any, Any]"
    bfloat16: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Carried":
        """Make one ready; it is copied to the CPU if it is elsewhere."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return cls(tensor.view(torch.int16).numpy(), bfloat16=True)
        return cls(tensor.numpy(), bfloat16=False)

    def tensor(self) -> torch.Tensor:
        """The tensor, in memory of its own: what Ray hands out may not be written to."""
        tensor = torch.from_numpy(self.values.copy())
        return tensor.view(torch.bfloat16) if self.bfloat16 else tensor


@dataclass(frozen=True)
class Pass:
    """One pass of one session through one stage; see `cloud_node.engine.Engine` for what the figures mean.

    Attributes:
        waits: the session's passes may wait for the edge at ports.
        sites: where they do.
        again: a backward brings the input too.
        adapters: to park, or values to attach.
        parts: backwards whose gradients are summed.
    """

    kind: Kind
    session: str
    microbatch: int
    rows: Rows | None = None
    keep: bool = False
    place: Place | None = None
    waits: bool = False
    sites: frozenset[Site] = frozenset()
    parked: int = 0
    input_gradient: bool = True
    again: bool = False
    adapters: Mapping[Site, tuple[Carried, Carried]] = field(default_factory=dict)
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a pass beside its tensor; `peak_bytes` are those of the stage so far."""

    work: Work
    kept: bool = False
    taps: Carried | None = None
    gradients: tuple[Carried, ...] = ()
    peak_bytes: int = 0


@dataclass(frozen=True)
class Asking:
    """A question at ports: which pass asks, and what (see `isthmus.round_trips.Question`)."""

    asker: str
    block: int
    modules: tuple[str, ...]
    tensors: tuple[Carried, ...]
    widths: tuple[int, ...]
    backward: bool
    wanted: bool

    @classmethod
    def of(cls, asker: str, question: Question) -> "Asking":
        """Make a question ready."""
        tensors = tuple(Carried.of(tensor) for tensor in question.tensors)
        modules, widths = tuple(question.modules), tuple(question.widths)
        return cls(asker, question.block, modules, tensors, widths, question.backward, question.wanted)

    def question(self) -> Question:
        """The question."""
        tensors = [carried.tensor() for carried in self.tensors]
        return Question(self.block, self.modules, tensors, self.widths, self.backward, self.wanted)


Reply: TypeAlias = Sequence[Carried] | IsthmusError
"""What a question is answered with, or why it is not."""


def carried_adapters(adapters: Mapping[Site, Parked]) -> dict[Site, tuple[Carried, Carried]]:
    """Adapters to park, made ready."""
    return {site: (Carried.of(one.down_RI), Carried.of(one.up_OR)) for site, one in adapters.items()}


def carried_values(values: Mapping[Site, Values]) -> dict[Site, tuple[Carried, Carried]]:
    """Values of LoRA for a step, made ready: the one kind that there is has two tensors."""
    return {site: (Carried.of(one.tensors[0]), Carried.of(one.tensors[1])) for site, one in values.items()}


class LostSessionError(Exception):
    """A stage does not know the session: it began anew since."""
