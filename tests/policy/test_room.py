"""Room among one tenant's own sessions: nobody is refused for ever, and nobody who has gone is waited for."""

from collections.abc import Iterator

import pytest

from cloud_node.policy.room import GONE_S, LONG_S, WAITING, Room


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def seconds(clock: Clock, how_many: float) -> Iterator[int]:
    """Each of these seconds."""
    for second in range(int(how_many)):
        clock.now += 1
        yield second


def test_whoever_comes_first_is_served_while_nobody_waits_for_long(clock: Clock) -> None:
    room = Room(clock)
    assert room.has(b"a", 40, 64)
    room.take(b"a", 40)
    assert not room.has(b"b", 40, 64)
    room.give(40)
    assert room.has(b"c", 40, 64)


def test_who_asks_at_once_does_not_starve_who_comes_every_second(clock: Clock) -> None:
    room = Room(clock)
    room.take(b"held", 64)
    for _ in seconds(clock, LONG_S + 1):
        assert not room.has(b"waits", 64, 64)
        room.give(64)
        held = room.has(b"next", 64, 64)
        if held:
            room.take(b"next", 64)
    assert not held, "room is held free"
    assert room.has(b"waits", 64, 64)


def test_of_two_that_starve_the_first_is_the_first(clock: Clock) -> None:
    room = Room(clock)
    room.take(b"held", 64)
    assert not room.has(b"first", 40, 64)
    for _ in seconds(clock, LONG_S + 1):
        assert not room.has(b"second", 40, 64)
        assert not room.has(b"first", 40, 64)
    room.give(64)
    assert not room.has(b"second", 40, 64)
    assert room.has(b"first", 40, 64)
    room.take(b"first", 40)
    assert not room.has(b"second", 40, 64)
    room.give(40)
    assert room.has(b"second", 40, 64)


def test_what_fits_beside_who_starves_is_served(clock: Clock) -> None:
    room = Room(clock)
    room.take(b"held", 24)
    for _ in seconds(clock, LONG_S + 1):
        assert not room.has(b"long", 60, 64)
    room.give(24)
    assert room.has(b"short", 4, 64)
    assert not room.has(b"longer", 5, 64)


def test_who_does_not_come_back_holds_nothing(clock: Clock) -> None:
    room = Room(clock)
    room.take(b"held", 64)
    for _ in seconds(clock, LONG_S + 1):
        assert not room.has(b"gone", 64, 64)
    room.give(64)
    clock.now += GONE_S
    assert room.has(b"next", 64, 64)


def test_a_flood_of_refused_requests_is_forgotten(clock: Clock) -> None:
    room = Room(clock)
    room.take(b"held", 64)
    assert not any(room.has(f"{number}".encode(), 1, 64) for number in range(2 * WAITING))
    assert len(room._waiting) == WAITING
