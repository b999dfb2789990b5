"""A round gives the average of those who stayed; who is lost costs only itself, and nothing is taken twice."""

from pathlib import Path

import pytest
import torch

from cloud_node.round_run import MOST_RESTARTS
from edge_client.round_edge import Averaged, EdgeInRound
from isthmus.errors import CertificateError, ForbiddenError, LimitError, RepeatError, UsageError, WireError
from isthmus.wire.gen import backbone_pb2 as pb
from tests.rounds.edges import START, WAIT_S, Node, difference_of, edge, mean_of, rounds_of


def averaged(each: EdgeInRound) -> Averaged:
    """What a round that is done gives."""
    return each.carry_out(1.0, lambda _: pytest.fail("the round is not done"))


def is_mean(found: Averaged, *seeds: int) -> bool:
    """Whether it is these edges' plain average."""
    wanted = mean_of(*seeds)
    return all(torch.allclose(found.values[name], wanted[name], atol=1e-7) for name in wanted)


def joined(node: Node, folder: Path, *seeds: int, number: int = 1) -> list[EdgeInRound]:
    """Edges that have joined, gathered."""
    edges = [edge(node, folder, seed, number) for seed in seeds]
    for each in edges:
        assert not each.step()
    node.now += WAIT_S
    return edges


def test_three_edges_average(node: Node, identities: Path) -> None:
    """Each gets the same; and a second round begins as soon as all of the first are there."""
    edges = joined(node, identities, 0, 1, 2)
    rounds_of(*edges)
    assert all(is_mean(averaged(each), 0, 1, 2) and averaged(each).counted for each in edges)
    second = [edge(node, identities, seed, 2) for seed in (2, 1, 0)]
    rounds_of(*second)
    assert is_mean(averaged(second[0]), 0, 1, 2)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_edge_lost_costs_only_itself(node: Node, identities: Path, steps: int) -> None:
    """Whether before its key, after it, or before its integers; and it rejoins in the round after."""
    edges = joined(node, identities, 0, 1, 2, 3)
    for _ in range(steps):
        for each in edges if steps < 3 else edges[:3]:
            each.step()
        edges[3:] = edges[3:] if steps > 1 else []
    if steps == 2:
        edges[3:] = []
    lost = steps != 2  # with two steps all had sent everything
    rounds_of(*edges[:3])
    node.now += WAIT_S
    rounds_of(*edges[:3])
    assert all(is_mean(averaged(each), *((0, 1, 2) if steps != 2 else (0, 1, 2, 3))) for each in edges[:3]) or lost
    back = edge(node, identities, 3)
    assert averaged(back).edges in (3, 4)  # it has the sum all the same
    again = [edge(node, identities, seed, 2) for seed in range(4)]
    for each in again:
        each.step()
    node.now += WAIT_S
    rounds_of(*again)
    assert is_mean(averaged(again[3]), 0, 1, 2, 3)
