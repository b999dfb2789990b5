"""Daily budgets: a request is charged once however often it comes, across restarts, until midnight."""

from pathlib import Path

import pytest

from cloud_node.policy.tenant import Pace
from cloud_node.policy.usage import DAY_S, Usage
from isthmus.errors import LimitError, UsageError

NOON = 20_000 * DAY_S + DAY_S / 2


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_repeat_is_free_and_what_is_too_much_says_when_the_day_ends(tmp_path: Path) -> None:
    clock = Clock(NOON)
    usage = Usage(tmp_path / "usage", clock)
    assert [usage.charge("alice", b"one", 60, 100) for _ in range(3)] == [60, 0, 0]
    with pytest.raises(LimitError, match="60 of its 100 tokens") as caught:
        usage.charge("alice", b"two", 41, 100)
    assert caught.value.retry_after_s == DAY_S / 2
    assert usage.charge("bob", b"one", 60, 100) == 60, "another's budget"
    assert usage.charge("alice", b"three", 40, 100) == 40
    assert usage.charge("alice", b"one", 60, 100) == 0, "free even where nothing is left"


def test_what_no_day_has_room_for_does_not_say_to_come_again(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="send smaller ones") as caught:
        Usage(tmp_path / "usage", Clock(NOON)).charge("alice", b"one", 101, 100)
    assert caught.value.retry_after_s is None


def test_a_restart_forgets_nothing_and_midnight_everything(tmp_path: Path) -> None:
    clock = Clock(NOON)
    Usage(tmp_path / "usage", clock).charge("alice", b"one", 90, 100)  # never closed, as where the node is killed
    again = Usage(tmp_path / "usage", clock)
    assert (again.used("alice"), again.charge("alice", b"one", 90, 100)) == (90, 0)
    with pytest.raises(LimitError):
        again.require("alice", b"two", 11, 100)
    clock.now += DAY_S / 2
    assert again.used("alice") == 0
    assert again.charge("alice", b"two", 90, 100) == 90


def test_a_record_that_cannot_be_kept_is_told_of_before_anything_is_served(tmp_path: Path) -> None:
    (tmp_path / "usage").write_bytes(b"no database" * 1000)
    for file in (tmp_path / "usage", tmp_path / "none" / "usage"):
        with pytest.raises(UsageError, match="name a file that can be written as `usage:`"):
            Usage(file)


def test_a_disk_that_refuses_is_answered_in_words_and_nothing_is_given_away(tmp_path: Path) -> None:
    usage = Usage(tmp_path / "usage", Clock(NOON))
    usage._base.execute("PRAGMA query_only=1")
    with pytest.raises(LimitError, match="tell the model owner") as caught:
        usage.charge("alice", b"one", 60, 100)
    assert caught.value.retry_after_s is not None
    usage._base.execute("PRAGMA query_only=0")
    assert usage.charge("alice", b"one", 60, 100) == 60


def test_a_pace_lets_any_one_request_through_and_then_waits_for_what_it_took() -> None:
    clock = Clock(0.0)
    pace = Pace(clock)
    assert pace.wait_s(100) == 0
    pace.take(1000)
    assert pace.wait_s(100) == 10
    clock.now = 10.0
    assert pace.wait_s(100) == 0
    clock.now = 1000.0
    pace.take(200)
    assert pace.wait_s(100) == 1, "a second's rate may be saved up, and no more"


def test_what_moved_while_there_was_no_pace_is_not_owed_later() -> None:
    clock = Clock(0.0)
    pace = Pace(clock)
    assert pace.wait_s(None) == 0
    pace.take(10**9)
    assert pace.wait_s(100) == 0
