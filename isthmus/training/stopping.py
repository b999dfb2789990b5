"""Ctrl-C and SIGTERM as a wish that work looks at between its steps.

Knows signals; knows nothing of what is stopped.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that fills when the user asks to stop; asking twice ends the process at once."""
    asked: list[int] = []

    def note(signum: int, _: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the host program handles signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
