"""Microbatches take turns: one computes at a time, and whoever waits for the cloud lets the others go on."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from edge_client.turns import Turns

WITHIN_S = 60.0


def test_who_waits_lets_those_that_begin_go_first_and_goes_on_in_the_order_of_answers() -> None:
    turns, seen = Turns(), []
    answers: list[Future[None]] = [Future() for _ in range(3)]
    below = threading.Semaphore(0)

    def microbatch(number: int) -> None:
        with turns.taken():
            seen.append(f"below {number}")
            below.release()
            with turns.given_up():
                answers[number].result(WITHIN_S)
            seen.append(f"above {number}")
            if number == 2:
                answers[0].set_result(None)
                answers[1].result(WITHIN_S)  # computes on: nobody else may meanwhile
                seen.append("still 2")

    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(microbatch, number) for number in range(3)]
        for _ in range(3):
            assert below.acquire(timeout=WITHIN_S)
        answers[2].set_result(None)
        answers[0].exception(WITHIN_S)
        answers[1].set_result(None)
        for one in done:
            one.result(WITHIN_S)
    assert sorted(seen[:3]) == ["below 0", "below 1", "below 2"]
    assert seen[3:5] == ["above 2", "still 2"]
    assert sorted(seen[5:]) == ["above 0", "above 1"]


def test_a_microbatch_that_begins_goes_before_one_that_was_answered_earlier() -> None:
    turns, seen = Turns(), []
    answered, computing, go_on = (threading.Event() for _ in range(3))

    def waits() -> None:
        with turns.taken():
            with turns.given_up():
                answered.wait(WITHIN_S)
            seen.append("goes on")

    def computes() -> None:
        with turns.taken():
            computing.set()
            go_on.wait(WITHIN_S)

    def begins() -> None:
        with turns.taken():
            seen.append("begins")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(waits)
        second = pool.submit(computes)
        assert computing.wait(WITHIN_S)
        answered.set()
        third = pool.submit(begins)
        while turns.waiting < 2:
            assert not first.done()
        go_on.set()
        for one in (first, second, third):
            one.result(WITHIN_S)
    assert seen == ["begins", "goes on"]


def test_a_failure_ends_a_turn() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.taken(), turns.given_up():
        raise ZeroDivisionError
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: turns.taken().__enter__()).result(WITHIN_S) is None


def test_who_has_no_turn_waits_without_one() -> None:
    turns = Turns()
    with turns.taken(), ThreadPoolExecutor(1) as pool:

        def waits() -> str:
            with turns.given_up():
                return "not held up"

        assert pool.submit(waits).result(WITHIN_S) == "not held up"
