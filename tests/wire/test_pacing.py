"""A line that is slowed on purpose carries the same frames in the same order, never earlier than its figures allow."""

import time
from collections.abc import Iterator

import pytest

from edge_client.pacing import Lane, Pace, held_back
from isthmus.errors import UsageError
from isthmus.planning.links import MBIT


def test_a_link_is_read_in_milliseconds_and_megabits() -> None:
    assert Pace.parse("50:100:20.5") == Pace(0.05, 100 * MBIT, 20.5 * MBIT)


@pytest.mark.parametrize(
    "text", ["", "50", "50:100", "50:100:100:1", "a:1:1", "-1:1:1", "5:0:1", "5:1:-1", "nan:1:1", "5:inf:1"]
)
def test_a_link_that_is_none_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"RTT:UP:DOWN.*50:100:100"):
        Pace.parse(text)


def test_a_lane_is_busy_with_one_frame_at_a_time_while_earlier_ones_travel() -> None:
    lane = Lane(rate=100.0, delay_s=5.0)
    assert lane.send(50, now=10.0) == (10.5, 15.5)
    assert lane.send(100, now=10.0) == (11.5, 16.5)
    assert lane.send(10, now=20.0) == (20.1, 25.1)


def test_frames_keep_their_order_and_an_error_comes_after_them() -> None:
    def frames() -> Iterator[bytes]:
        yield from (b"a", b"bb", b"ccc")
        raise ConnectionError("gone")

    held = held_back(frames(), Lane(1e9, 0.001), len)
    assert [next(held) for _ in range(3)] == [b"a", b"bb", b"ccc"]
    with pytest.raises(ConnectionError, match="gone"):
        next(held)


def test_no_frame_arrives_before_its_time() -> None:
    began = time.monotonic()
    assert len(list(held_back((bytes(100) for _ in range(5)), Lane(rate=10_000.0, delay_s=0.05), len))) == 5
    assert time.monotonic() - began >= 5 * 0.01 + 0.05
