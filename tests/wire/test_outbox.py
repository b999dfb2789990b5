"""No message waits for another to finish, and none is disordered."""

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.wire.chunks import Outbox


def drained(outbox: Outbox[str]) -> list[str]:
    taken = []
    while (frame := outbox.next()) is not None:
        taken.append(frame)
    return taken


def test_messages_take_turns() -> None:
    outbox: Outbox[str] = Outbox()
    for frames in (["a0", "a1", "a2"], ["b0"], ["c0", "c1"]):
        outbox.put(frames)
    assert drained(outbox) == ["a0", "b0", "c0", "a1", "c1", "a2"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=6))
def test_each_message_keeps_its_order_and_is_never_more_than_one_turn_behind(lengths: list[int]) -> None:
    outbox: Outbox[str] = Outbox()
    for message, length in enumerate(lengths):
        outbox.put([f"{turn} {message}" for turn in range(length)])
    expected = [f"{turn} {message}" for turn in range(6) for message, length in enumerate(lengths) if turn < length]
    assert drained(outbox) == expected


def test_a_late_small_message_overtakes_the_rest_of_a_large_one() -> None:
    outbox: Outbox[str] = Outbox()
    outbox.put(f"large {i}" for i in range(1000))
    assert outbox.next() == "large 0"
    outbox.put(["small"])
    assert [outbox.next(), outbox.next()] == ["large 1", "small"]


def test_a_message_of_a_lower_rank_goes_before_the_rest_of_a_higher_one_and_ranks_keep_their_turns() -> None:
    outbox: Outbox[str] = Outbox()
    outbox.put(["b0", "b1"], rank=2)
    outbox.put(["c0"], rank=2)
    assert outbox.next() == "b0"
    outbox.put(["a0", "a1"], rank=1)
    assert len(outbox) == 3
    assert drained(outbox) == ["a0", "a1", "c0", "b1"]


def test_control_frames_go_before_every_message_in_their_own_order() -> None:
    outbox: Outbox[str] = Outbox()
    outbox.put(["a0", "a1"])
    outbox.put_first("x")
    outbox.put_first("y")
    assert drained(outbox) == ["x", "y", "a0", "a1"]


def test_an_outbox_is_true_exactly_while_it_has_a_frame() -> None:
    outbox: Outbox[str] = Outbox()
    outbox.put([])
    assert not outbox
    assert outbox.next() is None
    outbox.put(["a"])
    outbox.put_first("x")
    assert (bool(outbox), len(outbox)) == (True, 2)
    assert drained(outbox) == ["x", "a"]
    assert not outbox


def test_frames_are_made_at_most_one_ahead() -> None:
    made: list[int] = []

    def frames() -> Iterator[str]:
        for i in range(100):
            made.append(i)
            yield str(i)

    outbox: Outbox[str] = Outbox()
    outbox.put(frames())
    outbox.next()
    assert made == [0, 1]
