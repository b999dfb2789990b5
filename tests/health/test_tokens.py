"""Health is what a real token says: at most one in a while whoever asks; busy, hung and failing are told apart."""

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from cloud_node.engine import Answer, Engine, EngineCard, Opening, Work
from cloud_node.health import EVERY_S, FAILED, LATE_S, NAME, NOT_FINITE, WEDGED_S, Health
from cloud_node.session import SESSION_NAME
from isthmus.cut import Cut
from isthmus.errors import UnreachableError
from tests.faults.training import wait_until

WITHIN_S = 20.0


class Span:
    """An engine of which one token is asked; what comes of it can be said."""

    def __init__(self) -> None:
        self.opened: list[Opening] = []
        self.tokens = 0
        self.closed = 0
        self.free = threading.Event()
        self.free.set()
        self.outcome: Callable[[torch.Tensor], torch.Tensor] = lambda token: token

    def describe(self) -> EngineCard:
        return EngineCard((Cut(2, 2), Cut(1, 0)), 8, "float32", "cpu")

    def open(self, session: str, opening: Opening) -> None:
        assert session == NAME
        self.opened.append(opening)

    def close(self, session: str) -> None:
        self.closed += 1

    def forward(self, session: str, number: int, hidden_ND: torch.Tensor, rows: Any, keep: bool) -> Answer:
        assert (tuple(hidden_ND.shape), rows.tokens, keep) == ((1, 8), 1, False)
        self.tokens += 1
        assert self.free.wait(WITHIN_S)
        return Answer(self.outcome(hidden_ND), Work())


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Asked:
    """A health, its engine, its clock, and how many requests of others were answered."""

    def __init__(self) -> None:
        self.span, self.clock, self.answered = Span(), Clock(), 0
        self.health = Health(cast(Engine, self.span), lambda: self.answered, self.clock)

    def missing(self, within_s: float = WITHIN_S) -> str | None:
        return self.health.missing(within_s)


@pytest.fixture
def asked() -> Asked:
    return Asked()


def test_a_token_runs_alone_at_the_widest_span_and_leaves_nothing(asked: Asked) -> None:
    assert asked.missing() is None
    assert asked.span.opened == [Opening(Cut(1, 0), tenant=NAME, alone=True)]
    assert asked.span.closed == 1
    assert not SESSION_NAME.fullmatch(NAME), "no client's session is called so"


def test_whoever_asks_often_makes_nobody_compute(asked: Asked) -> None:
    for _ in range(100):
        assert asked.missing() is None
    assert asked.span.tokens == 1
    asked.clock.now += EVERY_S
    assert asked.missing() is None
    assert asked.span.tokens == 2


def test_many_who_ask_at_once_wait_for_one_token(asked: Asked) -> None:
    asked.span.free.clear()
    said: list[str | None] = []
    threads = [threading.Thread(target=lambda: said.append(asked.missing())) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: asked.span.tokens == 1, "the token")
    asked.span.free.set()
    for thread in threads:
        thread.join(WITHIN_S)
    assert (said, asked.span.tokens) == ([None] * 8, 1)


def test_an_engine_that_fails_is_not_serving_until_a_token_comes_through(asked: Asked) -> None:
    def fails(_: torch.Tensor) -> torch.Tensor:
        raise UnreachableError("the device is gone, and this secret with it")

    asked.span.outcome = fails
    assert asked.missing() == FAILED
    assert asked.span.closed == 1
    asked.span.outcome = lambda token: token
    assert asked.missing() == FAILED, "what is known, until it is time for another token"
    asked.clock.now += EVERY_S
    assert asked.missing() is None


def test_a_span_that_answers_no_numbers_is_not_serving(asked: Asked) -> None:
    asked.span.outcome = lambda token: token * float("nan")
    assert asked.missing() == NOT_FINITE


def test_an_engine_that_hangs_is_not_serving_and_after_long_wedged(asked: Asked) -> None:
    assert asked.missing() is None
    asked.span.free.clear()
    asked.clock.now += EVERY_S
    assert asked.missing(0.01) is None, "not late yet"
    asked.clock.now += LATE_S
    assert "on its way through the span for 20 s" in (asked.missing(0.01) or "")
    assert not asked.health.wedged
    asked.clock.now += WEDGED_S
    assert asked.health.wedged
    assert asked.span.tokens == 2, "a hung engine is asked once"
    asked.span.free.set()
    assert asked.missing() is None
    assert not asked.health.wedged


def test_an_engine_that_never_answered_is_not_serving(asked: Asked) -> None:
    asked.span.free.clear()
    assert "on its way" in (asked.missing(0.01) or "")
    asked.span.free.set()


def test_an_engine_that_is_busy_with_others_is_serving(asked: Asked) -> None:
    assert asked.missing() is None
    asked.span.free.clear()
    asked.clock.now += EVERY_S
    for _ in range(100):
        asked.clock.now += LATE_S - 1
        asked.answered += 1
        assert asked.missing(0.0) is None
    assert not asked.health.wedged
    asked.span.free.set()
