"""A round gives the average of those who stayed; who is lost costs only itself, and nothing is taken twice."""

from pathlib import Path

import pytest
import torch

from cloud_node.round_run import MOST_RESTARTS
from edge_client.round_edge import Averaged, EdgeInRound
from isthmus.errors import ForbiddenError, LimitError, RepeatError, UsageError, WireError
from isthmus.wire.gen import backbone_pb2 as pb
from tests.rounds.edges import START, WAIT_S, Node, edge, mean_of, rounds_of


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


@pytest.mark.parametrize("steps", [0, 1])
def test_an_edge_lost_costs_only_itself(node: Node, identities: Path, steps: int) -> None:
    """Before its key or after it: the rest begin another attempt without it, and it rejoins in the next round."""
    *stayed, lost = joined(node, identities, 0, 1, 2, 3)
    stayed[0].step()
    for _ in range(steps):
        lost.step()
    rounds_of(*stayed, turns=3)
    node.now += WAIT_S
    rounds_of(*stayed)
    assert all(is_mean(averaged(each), 0, 1, 2) for each in stayed)
    assert ("round-left-out", "spiffe://isthmus/edge/edge-3", 1) in node.told
    late = averaged(edge(node, identities, 3))
    assert is_mean(late, 0, 1, 2)
    assert not late.counted
    again = [edge(node, identities, seed, 2) for seed in range(4)]
    rounds_of(*again)  # all that were there are back: nobody waits for the clock
    assert is_mean(averaged(again[3]), 0, 1, 2, 3)


def test_fresh_keys_for_each_attempt(node: Node, identities: Path) -> None:
    """What an edge sends in two attempts at one round has nothing in common, though it is of one difference."""
    *stayed, lost = joined(node, identities, 0, 1, 2, 3)
    stayed[0].step()
    lost.step()
    rounds_of(*stayed, turns=3)
    node.now += WAIT_S
    rounds_of(*stayed)
    first, second = stayed[0].at.sent  # type: ignore[attr-defined]
    assert first.attempt < second.attempt
    assert not any(first.masked[at : at + 4] == second.masked[at : at + 4] for at in range(0, len(first.masked), 4))


def test_an_edge_that_was_killed_is_there_again(node: Node, identities: Path) -> None:
    """Its keys are gone, so the attempt is; the clock need not run out."""
    edges = joined(node, identities, 0, 1, 2)
    for each in edges:
        each.step()
    edges[2] = edge(node, identities, 2)
    rounds_of(*edges)
    assert is_mean(averaged(edges[0]), 0, 1, 2)


def test_an_edge_that_was_killed_after_it_sent_sends_nothing_more(node: Node, identities: Path) -> None:
    """What it sent counts, and it gets the sum."""
    edges = joined(node, identities, 0, 1, 2)
    for each in edges[:2]:
        each.step()
    for at in (2, 0):  # the last key, and at once what is due; then edge 0's integers
        edges[at].step()
    again = edge(node, identities, 0)
    again.step()
    rounds_of(*edges[1:])
    assert is_mean(averaged(again), 0, 1, 2)
    assert not again.at.sent  # type: ignore[attr-defined]


def test_who_begins_again_without_end_is_left_out(node: Node, identities: Path) -> None:
    """It may not keep the others from their round."""
    *stayed, _ = joined(node, identities, 0, 1, 2, 3)
    for _ in range(MOST_RESTARTS + 2):
        edge(node, identities, 3).step()
    rounds_of(*stayed)
    assert is_mean(averaged(stayed[0]), 0, 1, 2)


@pytest.mark.parametrize("stage", ["gathering", "keys", "sums"])
def test_a_node_that_was_killed_goes_on(node: Node, identities: Path, stage: str) -> None:
    """At any stage: edges ask again, a later attempt begins, and no attempt's number comes twice."""
    edges = joined(node, identities, 0, 1, 2)
    for each in {"gathering": [], "keys": edges[:2], "sums": [*edges, edges[0]]}[stage]:
        each.step()
    before = edges[0]._answered
    node.start()
    for each in edges:
        each.step()
    node.now += WAIT_S
    rounds_of(*edges)
    assert is_mean(averaged(edges[1]), 0, 1, 2)
    assert edges[0]._answered > before
    node.start()
    assert is_mean(averaged(edge(node, identities, 0)), 0, 1, 2)


def test_the_same_is_answered_and_a_changed_one_refused(node: Node, identities: Path) -> None:
    """While the round lasts, and when it is done."""
    edges = joined(node, identities, 0, 1, 2)
    rounds_of(*edges, turns=1)
    rounds_of(edges[0], turns=1)
    at = edges[0].at  # type: ignore[attr-defined]
    (sent,) = at.sent
    changed = pb.RoundSubmit()
    changed.CopyFrom(sent)
    changed.masked = bytes(len(sent.masked))
    assert at.submit(sent).mine
    with pytest.raises(RepeatError, match="something else"):
        at.submit(changed)
    rounds_of(*edges)
    assert at.submit(sent).stage == pb.RoundState.STAGE_DONE
    with pytest.raises(RepeatError, match="which is done"):
        at.submit(changed)
    assert is_mean(averaged(edges[0]), 0, 1, 2)


def test_another_difference_for_the_same_round_is_refused(node: Node, identities: Path) -> None:
    """An edge is bound to the first that it joined with, also by a node that was killed since."""
    first = edge(node, identities, 0)
    first.step()
    node.start()
    other = edge(node, identities, 0)
    other._join.commitment = bytes(32)
    with pytest.raises(RepeatError, match="another change"):
        other.step()
    edge(node, identities, 0).step()


def test_two_edges_are_no_round(node: Node, identities: Path) -> None:
    """The node waits for a third, however long; an edge that is shown two keys takes no part."""
    edges = joined(node, identities, 0, 1)
    node.now += 100 * WAIT_S
    assert not any(each.step() for each in edges)
    assert not edges[0].at.sent  # type: ignore[attr-defined]
    state = edges[0].at.join(edges[0]._join)  # type: ignore[attr-defined]
    forged = pb.RoundState(run=state.run, round=1, attempt=1, stage=pb.RoundState.STAGE_SUMS)
    forged.keys.extend(each._fresh_key(1) for each in edges)
    with pytest.raises(LimitError, match="2 edges are too few"):
        edges[0]._take(forged)


def test_an_edge_that_asks_for_more_waits_for_more(node: Node, identities: Path) -> None:
    """The largest cohort that anyone asks for is the round's."""
    edges = [edge(node, identities, seed, cohort=4 if seed == 0 else 3) for seed in range(3)]
    for each in edges:
        each.step()
    node.now += WAIT_S
    rounds_of(*edges)
    assert not any(each.step() for each in edges)
    rounds_of(*edges, edge(node, identities, 3))
    node.now += WAIT_S
    rounds_of(*edges)


def test_a_forged_key_is_refused_on_both_sides(node: Node, identities: Path) -> None:
    """Unsigned, of an earlier attempt, or of another edge."""
    edges = joined(node, identities, 0, 1, 2)
    state = edges[0].at.join(edges[0]._join)  # type: ignore[attr-defined]
    good = [each._fresh_key(state.attempt) for each in edges]
    broken = pb.RoundKey()
    broken.CopyFrom(good[0])
    broken.public_key = b"x" * 32
    with pytest.raises(WireError, match="not signed"):
        node.run.key(edges[0]._me, broken)
    with pytest.raises(ForbiddenError, match="that signed it"):
        node.run.key(edges[0]._me, good[1])
    seen = pb.RoundState(run=state.run, round=1, attempt=state.attempt, stage=pb.RoundState.STAGE_SUMS)
    seen.keys.extend([good[0], good[1], broken])
    with pytest.raises(WireError, match="not signed"):
        edges[0]._take(seen)
    old = edges[2]._fresh_key(state.attempt)
    edges[0]._fresh_key(state.attempt + 1)
    del seen.keys[:]
    seen.keys.extend([good[0], good[1], old])
    seen.attempt = state.attempt + 1
    with pytest.raises(WireError, match="not signed"):
        edges[0]._take(seen)


def test_a_node_that_swaps_an_edges_own_key_is_found_out(node: Node, identities: Path) -> None:
    """An earlier key of its own, for the same attempt, is not the one that it holds the secret of."""
    edges = joined(node, identities, 0, 1, 2)
    run = node.run.run
    for each in edges:
        each._run = run
    keys = [each._fresh_key(1) for each in edges]
    edges[0]._fresh_key(1)
    seen = pb.RoundState(run=run, round=1, attempt=1, stage=pb.RoundState.STAGE_SUMS, keys=keys)
    with pytest.raises(WireError, match="another key than this edge sent"):
        edges[0]._take(seen)


def test_what_does_not_fit_is_refused(node: Node, identities: Path) -> None:
    """Other terms, other values to begin with, a round that is not due, too few integers."""
    edges = joined(node, identities, 0, 1)
    with pytest.raises(WireError, match="other values"):
        edge(node, identities, 2, start={name: value + 1 for name, value in START.items()}).step()
    with pytest.raises(UsageError, match="not due"):
        edge(node, identities, 2, number=2).step()
    other = pb.RoundJoin()
    other.CopyFrom(edges[0]._join)
    other.terms.clip = 2.0
    with pytest.raises(WireError, match="--clip"):
        node.run.join(edges[0]._me, other)
    with pytest.raises(WireError, match="integers"):
        node.run.submit(edges[0]._me, pb.RoundSubmit(round=1, attempt=1, masked=b"1234"))
    with pytest.raises(UsageError, match="not done"):
        node.run.result(edges[0]._me, 1)
