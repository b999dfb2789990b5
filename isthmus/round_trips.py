"""Linear modules of the span that wait, while they run, for what the edge adds to their output.

Knows modules, autograd and rows; who carries the question to the edge is handed in. Modules that share an input ask
once. Method: Gao and Zhang, DLoRA (2024), arXiv:2404.05182, as we read it; the paper's code is not public.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from isthmus.blocks import BlockList
from isthmus.cores import Frozen
from isthmus.linears import Linear, Site, linears_in
from isthmus.rows import pack, pad


@dataclass(frozen=True)
class Question:
    """What a pass asks at ports of one block that share their input.

    Attributes:
        block: of the ports.
        modules: the ports.
        tensors: forward: the input [N, D], or with cores [N, R] for each port; backward: the gradients of what was
            answered, [N, width] for each port.
        widths: last sizes of what is due, [N, width] each.
        backward: which pass asks.
        wanted: forward: a backward will follow; backward: the gradient of the input is due.
    """

    block: int
    modules: Sequence[str]
    tensors: Sequence[torch.Tensor]
    widths: Sequence[int]
    backward: bool
    wanted: bool


class Edge(Protocol):
    """The way to the edge from within one pass."""

    def ask(self, question: Question) -> list[torch.Tensor]:
        """Send a question and wait for its answer."""


@dataclass(frozen=True)
class Parked:
    """A frozen adapter: adds `up_OR` times `down_RI` times the input."""

    down_RI: torch.Tensor
    up_OR: torch.Tensor

    @property
    def values(self) -> int:
        """Its parameters, hence multiplications for a token."""
        return self.down_RI.numel() + self.up_OR.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""
        return self.down_RI.nbytes + self.up_OR.nbytes

    def added(self, hidden: torch.Tensor) -> torch.Tensor:
        """What to add to the module's output for `hidden` [..., I], in its dtype."""
        return (hidden.to(self.down_RI.dtype) @ self.down_RI.T @ self.up_OR.T).to(hidden.dtype)


class RoundTrips:
    """What is added in one forward, and what the backward of it will ask."""

    def __init__(
        self,
        active: Collection[Site],
        parked: Mapping[Site, Parked],
        linears: Mapping[Site, Linear],
        edge: Edge,
        index_N: torch.Tensor | None,
        graph: bool,
        frozen: Mapping[Site, Frozen] | None = None,
    ) -> None:
        """Say who answers where.

        Args:
            active: sites where the edge is asked.
            parked: what is added without it.
            linears: the span's.
            edge: who answers.
            index_N: the real tokens among those that run.
            graph: a backward may follow.
            frozen: the factors around the cores that the edge has at all active sites; None: it has whole adapters.
        """
        self.edge = edge  # of the pass that runs now: a backward is another request than its forward
        self.index_N = index_N
        self.anchor = torch.zeros((), requires_grad=graph)  # so that the lowest ports have a backward in any case
        self.reached = False  # whether any port was
        self._active = frozenset(active)
        self._parked = parked
        self._linears = linears
        self._frozen = frozen
        self._added: dict[Site, torch.Tensor] = {}

    def forget(self) -> None:
        """Let go of what a pass that failed has left: its graph would hold itself."""
        self._added.clear()

    def added_at(self, site: Site, hidden: torch.Tensor) -> torch.Tensor | None:
        """What to add to a module's output for its input `hidden`; None where nothing is."""
        if site not in self._active:
            return self._parked[site].added(hidden) if site in self._parked else None
        if site not in self._added:
            block, _ = site
            modules = [name for name in self._linears[site].shared if (block, name) in self._active]
            added = self._asked(block, modules, hidden)
            self._added |= {(block, name): part for name, part in zip(modules, added, strict=True)}
            self.reached = True
        return self._added.pop(site)

    def _asked(self, block: int, modules: list[str], hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """What to add to the outputs of modules that share an input."""
        if self._frozen is None:
            widths = [self._linears[block, name].outputs for name in modules]
            added: Sequence[torch.Tensor] = _Added.apply(  # type: ignore[no-untyped-call]
                self.anchor, self, block, modules, widths, hidden
            )
            return added
        frozen = [self._frozen[block, name] for name in modules]
        reduced = [each.reduced(hidden) for each in frozen]
        widths = [part.shape[-1] for part in reduced]
        answers = _Added.apply(self.anchor, self, block, modules, widths, *reduced)  # type: ignore[no-untyped-call]
        return [each.added(answer) for each, answer in zip(frozen, answers, strict=True)]


class _Added(torch.autograd.Function):
    """One question forward and one backward for ports that share an input."""

    @staticmethod
    def forward(
        context: Any,
        _: torch.Tensor,  # the anchor
        trips: RoundTrips,
        block: int,
        modules: list[str],
        widths: list[int],
        *sent: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        context.trips, context.block, context.modules = trips, block, modules
        context.shapes = [part.shape for part in sent]
        keep = context.needs_input_grad[0]
        tensors = [pack(part, trips.index_N) for part in sent]
        asked = Question(block, modules, tensors, widths, backward=False, wanted=keep)
        answers = trips.edge.ask(asked)
        return tuple(_spread(answer.to(sent[0]), trips.index_N, sent[0].shape) for answer in answers)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        trips, shapes, wanted = context.trips, context.shapes, context.needs_input_grad[-1]
        packed = [pack(gradient, trips.index_N) for gradient in gradients]
        widths = [shape[-1] for shape in shapes] if wanted else []
        asked = Question(context.block, context.modules, packed, widths, backward=True, wanted=wanted)
        answers = trips.edge.ask(asked)
        down = [
            _spread(answer.to(gradients[0]), trips.index_N, shape)
            for answer, shape in zip(answers, shapes, strict=False)  # none where none is wanted
        ]
        return torch.zeros(()), None, None, None, None, *(down if wanted else [None] * len(shapes))


def _spread(tokens_NK: torch.Tensor, index_N: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """Packed tokens at their places in a batch of `shape`, which may be flat."""
    flat = pad(tokens_NK, index_N, (1, shape[:-1].numel()))
    return flat.reshape(*shape[:-1], tokens_NK.shape[-1])


_running: ContextVar[RoundTrips | None] = ContextVar("round_trips", default=None)


@contextmanager
def asking(trips: RoundTrips) -> Iterator[None]:
    """Let the linear modules that this thread runs in here ask the edge."""
    token = _running.set(trips)
    try:
        yield
    finally:
        _running.reset(token)


def ask_at(found: BlockList, numbers: Sequence[int]) -> None:
    """Let calls inside `asking` add to what linear modules of these blocks put out; others are untouched."""

    def add(site: Site, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        trips = _running.get()
        added = trips.added_at(site, args[0]) if trips is not None else None
        return None if added is None else output + added

    for number in numbers:
        for name, module in linears_in(found.blocks[number]).items():
            module.register_forward_hook(partial(add, (number, name)))
