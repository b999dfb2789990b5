"""The budget for activations is shared by those that keep any: they wait for each other; one too many is told."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cloud_node.activations import SMALL_GRAPH, ActivationStore
from cloud_node.engine import Opening, Place
from cloud_node.in_process import InProcessEngine
from isthmus.errors import LimitError
from isthmus.rows import Rows
from tests.faults.test_activations import kept
from tests.faults.training import wait_until
from tests.tenants.conftest import CUT, hidden

ROWS = Rows((40, 24), (0, 0))
POSITIONS = 80


@pytest.fixture
def size(engine_of: Callable[..., InProcessEngine]) -> int:
    """Bytes that one forward over `ROWS` keeps."""
    engine = engine_of("llama")
    assert train(engine, "alone")
    return engine.load().held_bytes


def train(engine: InProcessEngine, session: str, microbatch: int = 1) -> bool:
    """Whether a forward is kept."""
    engine.open(session, Opening(CUT, tenant=session))
    return engine.forward(session, microbatch, hidden(ROWS, microbatch), ROWS, True).kept


def test_only_sessions_that_have_asked_to_keep_something_have_a_share(
    engine_of: Callable[..., InProcessEngine], size: int
) -> None:
    engine = engine_of("llama", 5 * size // 2)
    for number in range(10):
        engine.open(f"runs forward {number}", Opening(CUT))
        engine.forward(f"runs forward {number}", 1, hidden(ROWS, 1), ROWS, False)
    assert [train(engine, "trains", number) for number in range(3)] == [True, True, False]


def test_decoders_share_the_budget_and_leave_half_of_it_to_those_that_train(
    engine_of: Callable[..., InProcessEngine], size: int
) -> None:
    budget = 5 * size
    engine, rows = engine_of("llama", budget), Rows((60,), (0,))

    def most_held(decoder: str) -> int:
        """Bytes held at most while one more decodes many sequences."""
        engine.open(decoder, Opening(CUT))
        held = []
        for sequence in range(16):
            engine.decode(decoder, sequence + 1, hidden(rows, sequence), rows, Place(str(sequence), 0, 0))
            held.append(engine.load().held_bytes)
        return max(held)

    assert budget // 2 < max(most_held(f"decodes {number}") for number in range(5)) <= budget
    assert not train(engine, "trains")
    assert most_held("decodes beside it") <= budget // 2
    assert [train(engine, "trains", number) for number in range(2)] == [True, True]


def test_a_closed_decoder_leaves_nothing_and_its_share_to_others(engine_of: Callable[..., InProcessEngine]) -> None:
    engine, rows = engine_of("llama"), Rows((60,), (0,))
    engine.open("decodes", Opening(CUT))
    engine.decode("decodes", 1, hidden(rows, 1), rows, Place("sequence", 0, 0))
    assert engine.load().held_bytes
    engine.close("decodes")
    assert engine.load().held_bytes == 0


def test_a_pass_within_its_share_waits_for_what_others_hold_over_theirs() -> None:
    opened = ["a"]
    store = ActivationStore(100, lambda: len(opened))
    assert store.keep("a", 1, kept(100))
    opened.append("b")
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(store.begin, "b", 50, patience_s=30.0)
        wait_until(lambda: bool(store._changed._waiters), "it to wait")  # type: ignore[attr-defined]
        assert not waits.done()
        store.take("a", 1)
        assert waits.result(30)
    assert store.held_bytes == 50


def test_a_pass_waits_for_room_no_longer_than_it_is_told_and_not_at_all_over_its_share() -> None:
    opened = ["a"]
    store = ActivationStore(100, lambda: len(opened))
    assert store.keep("a", 1, kept(100))
    opened.append("b")
    assert not store.begin("b", 50, patience_s=0.01)
    began = time.monotonic()
    assert not store.begin("b", 51, patience_s=30.0)
    assert not store.begin("a", 1, patience_s=30.0)
    assert time.monotonic() - began < 10


def test_a_session_that_would_leave_no_share_room_for_a_small_graph_is_told_when_to_come_again(
    engine_of: Callable[..., InProcessEngine], size: int
) -> None:
    engine = engine_of("llama", 3 * SMALL_GRAPH * size // POSITIONS + 3)
    small = Rows((SMALL_GRAPH // 2,), (0,))

    def trains(session: str) -> bool:
        engine.open(session, Opening(CUT, tenant=session))
        return engine.forward(session, 1, hidden(small, 1), small, True).kept

    assert all(trains(session) for session in "abc")
    with pytest.raises(LimitError, match="try again when one of them has ended"):
        trains("d")
    assert torch.isfinite(engine.forward("d", 2, hidden(small, 1), small, False).tensor_KD).all()
    assert trains("a"), "those that train already go on"
    engine.close("b")
    assert trains("d")


def test_a_node_whose_whole_budget_holds_no_small_graph_refuses_nobody(
    engine_of: Callable[..., InProcessEngine], size: int
) -> None:
    engine = engine_of("llama", size // 10)
    assert [train(engine, session) for session in "abc"] == [False] * 3
