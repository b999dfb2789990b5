"""A stream is given up when its server shows no life, and not because something takes long."""

import pytest

from edge_client.silence import ANSWER_WITHIN_S, SILENCE_S, STUCK_S, Silence
from tests.retry.test_retrying import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def given_up_after(
    silence: Silence, clock: Clock, takes: bool = True, lives: bool = False, most: float = 2000
) -> float:
    """Seconds until it is given up; the line `takes` what is asked, and the server `lives` if it answers that."""
    began = clock.now
    while clock.now - began < most:
        clock.now += 1
        due = silence.due()
        if due == "give up":
            return clock.now - began
        if due == "ask" and takes:
            silence.left(life_only=True)
            if lives:
                clock.now += 1
                silence.heard(life_only=True)
    return clock.now - began


def test_a_server_that_answers_nothing_is_found(clock: Clock) -> None:
    assert given_up_after(Silence(clock), clock) == SILENCE_S + ANSWER_WITHIN_S


def test_a_server_that_takes_nothing_is_found(clock: Clock) -> None:
    assert given_up_after(Silence(clock), clock, takes=False) == STUCK_S


def test_a_server_that_computes_for_long_is_waited_for(clock: Clock) -> None:
    assert given_up_after(Silence(clock), clock, lives=True) >= 2000


def test_a_long_upload_before_a_long_computation_is_no_silence(clock: Clock) -> None:
    silence = Silence(clock)
    for _ in range(60):  # ten minutes in which nothing is heard, for there is nothing to say
        clock.now += 10
        assert silence.due() == "nothing"
        silence.left(life_only=False)
    assert given_up_after(silence, clock, lives=True) >= 2000


def test_an_idle_stream_that_is_answered_stays(clock: Clock) -> None:
    silence = Silence(clock)
    assert given_up_after(silence, clock, lives=True) >= 2000
    assert silence.moved == 1000, "signs of life are no progress"


def test_what_is_asked_is_asked_once(clock: Clock) -> None:
    silence = Silence(clock)
    clock.now += SILENCE_S
    assert [silence.due(), silence.due()] == ["ask", "nothing"]
