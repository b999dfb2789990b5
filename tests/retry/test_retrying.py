"""Trying again has patience, pauses and a budget; an error that it cannot help ends it at once."""

import random

import pytest

from edge_client.retrying import BACKOFF_S, BURST, EACH_S, MOST_BREAKS, SOONEST_S, Retrying
from isthmus import errors
from isthmus.errors import DrainingError, IsthmusError, LimitError, UnreachableError
from tests.retry.lines import most_in_a_minute

GONE = UnreachableError("gone")
RETRIED = {"unreachable", "draining", "audit"}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tries(retrying: Retrying, clock: Clock, error: IsthmusError = GONE, most: int = 10_000) -> list[float]:
    """When it was tried, if every attempt fails like this."""
    found = []
    while len(found) < most and (pause := retrying.pause(error)) is not None:
        clock.now += pause
        found.append(clock.now)
    return found


def limited(retry_after_s: float | None) -> LimitError:
    error = LimitError("too many; come again")
    error.retry_after_s = retry_after_s
    return error


@pytest.mark.parametrize("kind", errors.catalogue().values(), ids=errors.catalogue())
def test_only_a_server_that_is_gone_or_going_is_tried_again(kind: type[IsthmusError], clock: Clock) -> None:
    assert bool(tries(Retrying(60, clock), clock, kind("x"), most=1)) == (kind.code in RETRIED)


def test_attempts_end_when_patience_does_and_the_last_is_as_late_as_that(clock: Clock) -> None:
    found = tries(Retrying(60, clock), clock)
    assert found[-1] == pytest.approx(1060)
    assert len(found) < 30


def test_pauses_grow_to_their_longest_and_are_jittered(clock: Clock) -> None:
    middle = Retrying(600, clock, draw=lambda low, high: (low + high) / 2)
    pauses = [middle.pause(GONE) for _ in range(8)]
    assert pauses[:6] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, BACKOFF_S[1]])
    seeds = [Retrying(600, clock, random.Random(seed).uniform).pause(GONE) for seed in range(20)]
    assert len(set(seeds)) == 20
    assert all(pause is not None and 0.1 <= pause <= 0.3 for pause in seeds)


def test_patience_counts_from_the_last_progress(clock: Clock) -> None:
    retrying = Retrying(60, clock)
    for _ in range(5):
        clock.now += 50
        retrying.progressed()
    clock.now += 59
    assert retrying.pause(GONE) is not None
    clock.now += 2
    assert retrying.pause(GONE) is None


def test_what_moved_on_a_line_before_it_broke_is_progress_too(clock: Clock) -> None:
    retrying = Retrying(60, clock)
    clock.now += 500  # one large answer was on its way all this time
    retrying.broke(moved=clock.now - 1)
    assert retrying.pause(GONE) is not None


def test_work_that_begins_after_none_has_all_the_patience(clock: Clock) -> None:
    retrying = Retrying(60, clock)
    clock.now += 5000
    retrying.began()
    assert tries(retrying, clock)[-1] == pytest.approx(6060)


def test_progress_makes_pauses_short_again(clock: Clock) -> None:
    retrying = Retrying(600, clock, draw=lambda low, high: (low + high) / 2)
    tries(retrying, clock, most=6)
    clock.now += BURST * EACH_S
    retrying.progressed()
    assert retrying.pause(GONE) == pytest.approx(BACKOFF_S[0])


def test_a_line_that_breaks_after_each_answer_is_not_stormed(clock: Clock) -> None:
    """Every attempt brings an answer, so neither patience nor the longest pause ever bounds them."""
    retrying, found = Retrying(60, clock), []
    while clock.now < 1000 + 3600:
        retrying.progressed()
        retrying.broke(clock.now)
        pause = retrying.pause(GONE)
        assert pause is not None
        clock.now += pause
        found.append(clock.now)
    assert most_in_a_minute(found) <= BURST + 60 / EACH_S + 1
    assert len(found) <= BURST + 3600 / EACH_S + 1


def test_a_line_that_always_breaks_before_an_answer_is_given_up_with_the_count(clock: Clock) -> None:
    retrying, broken = Retrying(60, clock), 0
    while True:
        broken += 1
        retrying.broke(clock.now)  # something moved each time, so patience alone would never end
        pause = retrying.pause(GONE)
        if pause is None:
            break
        clock.now += pause
    assert broken == MOST_BREAKS + 1
    said = retrying.given_up(GONE)
    assert isinstance(said, UnreachableError)
    assert f"broke {broken} times" in str(said)


def test_a_server_that_says_when_is_waited_for_and_not_with_all_others_at_once(clock: Clock) -> None:
    pauses = [Retrying(60, clock, random.Random(seed).uniform).pause(limited(20)) for seed in range(20)]
    assert all(pause is not None and 20 <= pause <= 25 for pause in pauses)
    assert len(set(pauses)) == 20
    least = Retrying(60, clock).delay(limited(0))
    assert least is not None
    assert least >= SOONEST_S


def test_a_request_has_patience_from_when_it_was_first_refused(clock: Clock) -> None:
    retrying = Retrying(60, clock)
    clock.now += 500  # others' answers were on their way
    assert retrying.delay(limited(20), since=clock.now) is not None
    assert retrying.delay(limited(20), since=clock.now - 41) is None


@pytest.mark.parametrize("error", [limited(61), limited(None), LimitError("never")], ids=str)
def test_a_limit_is_final_where_its_end_is_beyond_patience_or_not_said(error: LimitError, clock: Clock) -> None:
    retrying = Retrying(60, clock)
    assert retrying.pause(error) is None
    assert retrying.delay(error) is None
    assert retrying.given_up(error) is error


def test_limits_that_never_end_do(clock: Clock) -> None:
    assert len(tries(Retrying(60, clock), clock, limited(10))) <= 6


def test_a_server_that_drains_is_waited_for(clock: Clock) -> None:
    assert tries(Retrying(60, clock), clock, DrainingError("going"))[-1] == pytest.approx(1060)
