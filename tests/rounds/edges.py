"""Edges of a round in one process, with real certificates: what `RoundRun` answers them, by a clock of the test's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cloud_node.round_run import RoundRun
from cloud_node.round_store import RoundStore
from edge_client.round_edge import EdgeInRound
from isthmus.rounds.quantised import layout_of
from isthmus.rounds.signed_keys import identity_of
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb

WAIT_S = 60.0
START = {"core": torch.zeros(2, 3), "bias": torch.ones(4)}
TERMS = pb.RoundTerms(
    protocol=1, name="reviews", model_digest="d" * 64, layout=layout_of(START), values=10, clip=1.0, every=5
)


def difference_of(seed: int) -> dict[str, torch.Tensor]:
    """What an edge changed."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=draw) * 0.1 for name, value in START.items()}


def mean_of(*seeds: int) -> dict[str, torch.Tensor]:
    """The plain average."""
    all_of = [difference_of(seed) for seed in seeds]
    return {name: torch.stack([each[name] for each in all_of]).mean(0) for name in START}


@dataclass
class Node:
    """A node that can be killed: what it does not keep on the disk is gone."""

    folder: Path
    ca: bytes
    now: float = 0.0
    told: list[tuple[str, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start."""
        self.start()

    def start(self) -> None:
        """Begin from the disk."""
        store = RoundStore(self.folder)
        self.run = RoundRun("reviews", store, TERMS, self.ca, WAIT_S, lambda *t: self.told.append(t), lambda: self.now)


@dataclass
class At:
    """The calls of one edge, and all that it sent."""

    node: Node
    identity: str
    sent: list[pb.RoundSubmit] = field(default_factory=list)

    def join(self, request: pb.RoundJoin) -> pb.RoundState:
        """As over the wire."""
        return self.node.run.join(self.identity, request)

    def keys(self, request: pb.RoundKey) -> pb.RoundState:
        """As over the wire."""
        return self.node.run.key(self.identity, request)

    def submit(self, request: pb.RoundSubmit) -> pb.RoundState:
        """As over the wire."""
        self.sent.append(request)
        return self.node.run.submit(self.identity, request)

    def result(self, request: pb.RoundAsk) -> pb.RoundSum:
        """As over the wire."""
        return self.node.run.result(self.identity, request.round)


def edge(
    node: Node, folder: Path, seed: int, number: int = 1, cohort: int = 3, start: Mapping[str, torch.Tensor] = START
) -> EdgeInRound:
    """Edge `seed`, a process of its own: it knows nothing of one before."""
    credentials = Credentials.load(folder / f"edge-{seed}")
    at = At(node, identity_of(credentials))
    made = EdgeInRound(at, credentials, TERMS, number, start, difference_of(seed), cohort)
    made.at = at  # type: ignore[attr-defined]
    return made


def rounds_of(*edges: EdgeInRound, turns: int = 8) -> None:
    """Let edges take turns until all are done, or as many times as said."""
    left = list(edges)
    for _ in range(turns):
        left = [each for each in left if not each.step()]
