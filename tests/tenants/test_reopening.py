"""A session that is opened under a closed one's name has nothing of the closed one."""

from collections.abc import Callable
from typing import Any

import pytest

from cloud_node.engine import Opening, Place
from cloud_node.in_process import InProcessEngine
from isthmus.errors import NotKeptError
from tests.tenants.conftest import CUT, hidden, rows

ROWS = rows(9, 7)


def reopen_while_it_runs(engine: InProcessEngine, runs: str) -> None:
    """Have the session closed and opened again in the middle of its next request."""
    span = engine._spans[CUT]
    run = getattr(span, runs)

    def reopening(*arguments: Any) -> Any:
        setattr(span, runs, run)
        engine.close("session")
        engine.open("session", Opening(CUT))
        return run(*arguments)

    setattr(span, runs, reopening)


@pytest.fixture
def engine(engine_of: Callable[..., InProcessEngine]) -> InProcessEngine:
    engine = engine_of("llama")
    engine.open("session", Opening(CUT))
    return engine


def test_a_graph_of_a_closed_session_is_not_kept_in_the_one_opened_meanwhile(engine: InProcessEngine) -> None:
    reopen_while_it_runs(engine, "forward")
    answer = engine.forward("session", 1, hidden(ROWS, 1), ROWS, True)
    assert not answer.kept
    assert engine.load().held_bytes == 0
    with pytest.raises(NotKeptError, match="send its input again"):
        engine.backward("session", 1, answer.tensor_KD, None)


def test_a_cache_of_a_closed_session_is_not_held_in_the_one_opened_meanwhile(engine: InProcessEngine) -> None:
    reopen_while_it_runs(engine, "decode")
    engine.decode("session", 1, hidden(ROWS, 1), ROWS, Place("sequence", 0, 0))
    assert engine.load().held_bytes == 0
    with pytest.raises(NotKeptError, match="send its past again"):
        engine.decode("session", 2, hidden(rows(1, 1), 2), rows(1, 1), Place("sequence", 9, 1))
