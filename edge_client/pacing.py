"""A slower, longer line than the one there is: real frames, held back as a link of a given delay and rate would.

Knows sizes and clocks; knows nothing of what frames mean. Bytes are those of the messages as serialised: what TLS and
TCP add is not modelled. For tests and benchmarks, and for trying a run as a phone would have it.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from isthmus.planning.links import Link

Frame = TypeVar("Frame")


class Pace(Link):
    """A link that frames are held back for."""

    def upwards(self, frames: Iterable[Frame], size: "Callable[[Frame], int]") -> Iterator[Frame]:
        """`frames` as they would arrive at the cloud."""
        return held_back(frames, Lane(self.up, self.round_trip_s / 2), size)

    def downwards(self, frames: Iterable[Frame], size: "Callable[[Frame], int]") -> Iterator[Frame]:
        """`frames` as they would arrive at the edge."""
        return held_back(frames, Lane(self.down, self.round_trip_s / 2), size)


class Lane:
    """One direction: frames take their turn at the rate, and each then travels for half a round trip."""

    def __init__(self, rate: float, delay_s: float) -> None:
        """Carry `rate` bytes a second with a delay of `delay_s`."""
        self._rate = rate
        self._delay_s = delay_s
        self._free = 0.0

    def send(self, size: int, now: float) -> tuple[float, float]:
        """When a frame of `size` bytes that is ready `now` has left, and when it arrives."""
        self._free = max(now, self._free) + size / self._rate
        return self._free, self._free + self._delay_s


def held_back(frames: Iterable[Frame], lane: Lane, size: Callable[[Frame], int]) -> Iterator[Frame]:
    """The same frames in the same order, each when it would arrive; the next is taken when the lane is free for it.

    Raises:
        Exception: whatever `frames` raises, after the frames before it.
    """
    travelling: queue.SimpleQueue[tuple[float, Iterator[Frame]]] = queue.SimpleQueue()

    def send() -> None:
        try:
            for frame in frames:
                left, arrives = lane.send(size(frame), time.monotonic())
                _sleep_until(left)
                travelling.put((arrives, iter((frame,))))
        except Exception as error:  # noqa: BLE001 (handed to whoever reads)
            travelling.put((0.0, _raising(error)))
        travelling.put((0.0, iter(())))

    threading.Thread(target=send, name="lane", daemon=True).start()
    while True:
        arrives, found = travelling.get()
        _sleep_until(arrives)
        frame = next(found, None)
        if frame is None:
            return
        yield frame


def _raising(error: Exception) -> Iterator[Frame]:
    raise error
    yield  # a generator, so that it raises when it is read


def _sleep_until(moment: float) -> None:
    left = moment - time.monotonic()
    if left > 0:
        time.sleep(left)
