"""What the service asks of a span, as one small protocol.

Knows requests, answers and what they cost; knows no model, no wire and no identities. Every answer is a pure function
of the request, so any request may be repeated; what an engine holds are caches only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from isthmus.attached import Values
from isthmus.cut import Cut
from isthmus.linears import Linear, Site
from isthmus.ports import Port
from isthmus.round_trips import Edge, Parked
from isthmus.rows import Rows


@dataclass
class Work:
    """What one request cost the cloud.

    `recompute_flops` are those of `forward_flops` that were run before; `port_s` are seconds of waiting for the edge at
    ports, `queue_s` those of waiting for the device, also after an answer.
    """

    forward_flops: int = 0
    backward_flops: int = 0
    recompute_flops: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0
    queue_s: float = 0.0
    port_s: float = 0.0


@dataclass
class Answer:
    """A result: `tensor_KD` on the CPU or the device, if activations wait, what it cost, taps, gradients of values."""

    tensor_KD: torch.Tensor
    work: Work
    kept: bool = False
    taps_NW: torch.Tensor | None = None
    gradients: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class Place:
    """Where a decode request stands: its sequence, the width already cached, and the request that made it."""

    sequence: str
    start: int
    after: int


@dataclass(frozen=True)
class Asked:
    """What a request of a session with round-trip ports asks beside the span itself.

    Attributes:
        sites: where the edge takes part.
        edge: who answers there.
        parked: the request that parked, or left for this step, what is added without the edge; 0: nothing is.
        input_gradient: the gradient of the hidden states is wanted.
    """

    sites: frozenset[Site] = frozenset()
    edge: Edge | None = None
    parked: int = 0
    input_gradient: bool = True


ASKED = Asked()


@dataclass(frozen=True)
class Opening:
    """What a session is opened for.

    Attributes:
        cut: one of those served.
        ports: of its own.
        tenant: whose it is; tenants take turns.
        alone: its requests are computed by themselves, so that they give the same bits whoever else asks.
    """

    cut: Cut
    ports: tuple[Port, ...] = ()
    tenant: str = ""
    alone: bool = False


@dataclass(frozen=True)
class Load:
    """What an engine is busy with, now and since it started.

    Attributes:
        waiting: requests that wait for the device now.
        weight_bytes: of the spans' weights.
        held_bytes: of kept activations, decode caches and parked adapters now.
        budget_bytes: that activations may take.
        peak_bytes: most bytes of tensors held at once, weights included; of several processes, each one's most.
        batches: how often the device ran so many requests at once, by that number.
        replicas: how many copies of the span run, all of their stages answering.
        restarts: processes of stages that had to begin anew.
        missing: stages that do not answer.
        stages: of each process that holds a part of the span, its place among the parts and its own load; none where
            this process holds all of it.
    """

    waiting: int = 0
    weight_bytes: int = 0
    held_bytes: int = 0
    budget_bytes: int = 0
    peak_bytes: int = 0
    batches: Mapping[int, int] = field(default_factory=dict)
    replicas: int = 1
    restarts: int = 0
    missing: int = 0
    stages: tuple[tuple[int, "Load"], ...] = ()


@dataclass(frozen=True)
class EngineCard:
    """What an engine serves: cuts, hidden size, the dtype it computes in, and where; linear modules, for ports.

    `engine` is its name as `--engine` has it.
    """

    cuts: tuple[Cut, ...]
    hidden_size: int
    dtype: str
    device: str
    linears: Mapping[Site, Linear] = field(default_factory=dict)
    engine: str = "inprocess"


class Engine(Protocol):
    """What the service asks of a span. Calls block and may come from many threads; tensors in are on the CPU.

    Sessions are names that the service has already authorised. Errors raised are from the catalogue.
    """

    def describe(self) -> EngineCard:
        """What is served."""

    def open(self, session: str, opening: Opening) -> None:
        """Begin a session; opening it again changes nothing."""

    def close(self, session: str) -> None:
        """Forget everything of a session."""

    def forward(
        self, session: str, microbatch: int, hidden_ND: torch.Tensor, rows: Rows, keep: bool, asked: Asked = ASKED
    ) -> Answer:
        """Run the span, keeping what a backward needs if asked and if there is room; a session with taps keeps none."""

    def backward(
        self,
        session: str,
        microbatch: int,
        grad_KD: torch.Tensor,
        again: tuple[torch.Tensor, Rows] | None,
        asked: Asked = ASKED,
    ) -> Answer:
        """Gradient of the span's input. Uses the kept forward, else runs `again` = (hidden_ND, rows) first.

        Raises:
            NotKeptError: nothing is kept and `again` is None.
        """

    def decode(
        self,
        session: str,
        microbatch: int,
        hidden_ND: torch.Tensor,
        rows: Rows,
        place: Place,
        asked: Asked = ASKED,
    ) -> Answer:
        """Run the span after a cached past; `place.start` 0 begins a sequence (prefill).

        Raises:
            NotKeptError: the cache does not hold exactly the past that `place` names.
        """

    def park(self, session: str, microbatch: int, adapters: Mapping[Site, Parked]) -> Answer:
        """Hold frozen adapters under a request's name, for later requests to add; they replace those held before.

        Raises:
            WireError: one does not fit its module.
        """

    def attach(self, session: str, microbatch: int, values: Mapping[Site, Values]) -> Answer:
        """Hold an adapter's values under a request's name, for the passes of a step; they replace those held before.

        Raises:
            WireError: they do not fit their module.
        """

    def gradients(self, session: str, values: int, parts: Sequence[int]) -> Answer:
        """The gradients of the values that request `values` left, summed over backwards; all of it is forgotten.

        Raises:
            NotKeptError: the values, or a backward's gradients, are gone.
        """

    def release(self, session: str, microbatches: Sequence[int], sequences: Sequence[str]) -> None:
        """Forget kept activations and decode caches."""

    def load(self) -> Load:
        """What it is busy with."""

    def stop(self) -> None:
        """Let go of what it holds outside this process; nothing is asked afterwards."""
