"""An adapter's values, attached to shared frozen modules for the passes of one session's step, and their gradients.

Knows linear modules, a closed list of methods as pure functions, and autograd; knows no session and no wire. A module
itself is never changed: calls inside `attaching` add to what it puts out, others pass it as if nothing were there.
Method: LoRA (Hu et al., 2021, arXiv:2106.09685), as `peft` computes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

import torch
from torch import nn

from isthmus.blocks import BlockList
from isthmus.errors import NotKeptError, WireError
from isthmus.linears import Linear, Site, linears_in
from isthmus.ports import LORA_VALUES

TENSORS: Mapping[str, int] = {LORA_VALUES: 2}
"""How many tensors a port of each kind has: down [R, I] and up [O, R], the scale in it."""

MOST_VALUES = max(TENSORS.values())


@dataclass(frozen=True)
class Values:
    """What came for one module: of which kind, and its tensors."""

    kind: str
    tensors: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def fitted(self, linear: Linear, device: torch.device) -> "Values":
        """The same as leaves of a graph on a device.

        Raises:
            WireError: they do not fit the module.
        """
        rank = len(self.tensors[0])
        shapes = [(rank, linear.inputs), (linear.outputs, rank)]
        if [tuple(tensor.shape) for tensor in self.tensors] != shapes or rank > min(linear.inputs, linear.outputs):
            raise WireError(f"values of shapes {[tuple(one.shape) for one in self.tensors]} do not fit their module")
        # A copy of its own: an answer's bytes must not be what the next request overwrites.
        return Values(self.kind, tuple(one.to(device).clone().requires_grad_(True) for one in self.tensors))

    def added(self, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What to add to `output` [..., O], the module's for `hidden` [..., I], in its dtype."""
        down_RI, up_OR = self.tensors[:2]
        return (hidden.to(down_RI.dtype) @ down_RI.T @ up_OR.T).type_as(output)


@dataclass
class Attached:
    """The values of one step of one session, and the gradients that its backwards have found.

    Attributes:
        request: that left them.
        values: by site.
    """

    request: int
    values: Mapping[Site, Values]
    _gradients: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def of(
        cls, request: int, values: Mapping[Site, Values], linears: Mapping[Site, Linear], device: torch.device
    ) -> "Attached":
        """Values as they can be attached: where the span is.

        Raises:
            WireError: some do not fit their module.
        """
        return cls(request, {site: one.fitted(linears[site], device) for site, one in values.items()})

    @property
    def leaves(self) -> list[torch.Tensor]:
        """All tensors, in the order that they came."""
        return [tensor for one in self.values.values() for tensor in one.tensors]

    @property
    def count(self) -> int:
        """Parameters, hence about as many multiplications for a token."""
        return sum(tensor.numel() for tensor in self.leaves)

    @property
    def nbytes(self) -> int:
        """Of the values and of the gradients that wait."""
        with self._lock:
            waiting = [one for found in self._gradients.values() for one in found]
        return sum(tensor.nbytes for tensor in (*self.leaves, *waiting))

    def note(self, microbatch: int, gradients: Sequence[torch.Tensor]) -> None:
        """Note what a backward has found; a backward that is run again replaces what it found before."""
        with self._lock:
            self._gradients[microbatch] = tuple(gradients)

    def summed(self, microbatches: Sequence[int]) -> list[torch.Tensor]:
        """Gradients of `leaves`, summed in the order of `microbatches`.

        Raises:
            NotKeptError: one of them has found none here.
        """
        if not self.values:
            return []
        with self._lock:
            if not set(microbatches) <= self._gradients.keys():
                raise NotKeptError("gradients of a backward are gone; send the values and the backwards again")
            total = list(self._gradients[microbatches[0]])
            for microbatch in microbatches[1:]:
                total = [one + more for one, more in zip(total, self._gradients[microbatch], strict=True)]
            return total


_attached: ContextVar[Attached | None] = ContextVar("attached_values", default=None)


@contextmanager
def attaching(held: Attached | None) -> Iterator[None]:
    """Compute with these values what this thread runs in here."""
    token = _attached.set(held)
    try:
        yield
    finally:
        _attached.reset(token)


def attach_at(found: BlockList, numbers: Sequence[int]) -> None:
    """Let calls inside `attaching` add to what linear modules of these blocks put out; others are untouched."""

    def add(site: Site, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        held = _attached.get()
        values = held.values.get(site) if held is not None else None
        return None if values is None else output + values.added(args[0], output)

    for number in numbers:
        for name, module in linears_in(found.blocks[number]).items():
            module.register_forward_hook(partial(add, (number, name)))
