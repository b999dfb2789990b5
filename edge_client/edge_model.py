"""The edge model: what is called, where it is cut, and the line to its span, if there is one.

Knows its parts and how they are used; puts nothing together.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edge_client.cached import Outputs
from edge_client.link import Agreement, Link
from edge_client.passes import RemoteBackbone
from edge_client.port_adapters import PortAdapters
from isthmus.architectures import reads_both_ways
from isthmus.blocks import BlockList
from isthmus.cut import Cut
from isthmus.emulated.recipe import Emulator
from isthmus.errors import UsageError
from isthmus.ledger.record import Phase
from isthmus.ledger.told import Told


@dataclass(frozen=True)
class Standin:
    """The emulator in the middle of an edge model: its bundle's id, what it is, and what its owner says it cost."""

    id: str
    about: Emulator
    costs: Told | None = None


@dataclass
class EdgeModel:
    """A model to call, its tokenizer, where it is cut, and the line to its span, if there is one."""

    model: PreTrainedModel
    found: BlockList
    cut: Cut
    reads: PreTrainedTokenizerBase | None
    name: str
    digest: str
    span_dtype: str
    row_tokens: int | None = None
    link: Link | None = None
    remote: RemoteBackbone | None = None
    outputs: Outputs | None = None
    adapters: PortAdapters | None = None
    standin: Standin | None = None
    true_span: Mapping[int, nn.Module] = field(default_factory=dict)  # by block number, where it may be plugged in

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's.

        Raises:
            UsageError: it has none.
        """
        if self.reads is None:
            raise UsageError(f"{self.name} reads pictures, not text; bring a training loop to edge_client.connect")
        return self.reads

    def __deepcopy__(self, _: dict[int, Any]) -> "EdgeModel":
        """A copied model is one of the same edge, and speaks through its line."""
        return self

    @property
    def waited_s(self) -> float:
        """Seconds that this thread has waited for the cloud, and then for its turn to compute."""
        return self.remote.waited_s if self.remote is not None else 0.0

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count what crosses the wire in here under `phase`."""
        if self.remote is None:
            yield
            return
        before, self.remote.phase = self.remote.phase, phase
        try:
            yield
        finally:
            self.remote.phase = before

    @contextmanager
    def plugged_in(self) -> Iterator[None]:
        """In here the true span stands where the emulator does.

        Raises:
            UsageError: there is none.
        """
        if not self.true_span:
            raise UsageError("the true span is not at hand; connect with --server and --watch")
        standing = {number: self.found.blocks[number] for number in self.true_span}
        try:
            for number, block in self.true_span.items():
                self.found.blocks[number] = block
            yield
        finally:
            for number, block in standing.items():
                self.found.blocks[number] = block

    def longest(self, asked: int, virtual: int = 0) -> int:
        """Tokens that a row may have: `asked`, or what the server takes beside `virtual` ones if that is fewer."""
        return asked if self.row_tokens is None else min(asked, self.row_tokens - virtual)

    def cached_outputs(self) -> Outputs:
        """The outputs of a span that stands above nothing that trains.

        Raises:
            UsageError: there are none.
        """
        if self.outputs is None:
            raise UsageError("this edge model keeps no outputs; connect with --train top or --method side")
        return self.outputs

    def compare_counts(self, timeout_s: float) -> Agreement | None:
        """Both sides' byte counts; None where nothing was sent."""
        return self.link.compare_counts(timeout_s) if self.link is not None and self.link.opened else None

    def close(self) -> None:
        """End the session, if there is one."""
        if self.link is not None:
            self.link.close()


def answers_where_wanted(cut: Cut, found: BlockList) -> bool:
    """Whether only the positions that reach the head come back: none is above the span, and no encoder's head picks."""
    return cut.top == 0 and not reads_both_ways(found.owner.config)


def device_of(edge: EdgeModel) -> torch.device:
    """Where the edge's part of the model is."""
    device: torch.device = next(edge.model.parameters()).device
    return device
