"""Calls that are ended when nothing moves on them any more: one that brings messages, and one that takes them.

Knows calls and seconds. What a server that answers pings, and nothing else, would keep waiting for ever ends here.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import grpc

from isthmus.errors import UnreachableError

STALLED_S = 60.0
"""A message is at most 1 MiB."""

JUDGED_S = 600.0
"""What was sent is looked at before it is answered."""

LOOK_EVERY_S = 0.5

Message = TypeVar("Message")


def arriving(call: Any, within_s: float = STALLED_S) -> Iterator[Any]:
    """The messages of a call; it is cancelled, which the reader sees as grpc.RpcError, if none comes for so long."""
    over, waiting_since = threading.Event(), time.monotonic()

    def watch() -> None:
        while not over.wait(within_s / 4):
            if time.monotonic() - waiting_since > within_s:
                call.cancel()
                return

    threading.Thread(target=watch, name="stalls", daemon=True).start()
    try:
        for message in call:
            yield message
            waiting_since = time.monotonic()
    finally:
        over.set()


def answered(call: Callable[[Iterator[Message]], Any], messages: Iterable[Message], within_s: float = JUDGED_S) -> Any:
    """What a call answers to messages; it is given up if it has taken none, nor answered, for so long.

    Raises:
        UnreachableError: it was given up.
        grpc.RpcError: it failed.
    """
    moved = time.monotonic()

    def taken() -> Iterator[Message]:
        nonlocal moved
        for message in messages:
            yield message
            moved = time.monotonic()

    under_way = call(taken())
    while True:
        try:
            return under_way.result(timeout=LOOK_EVERY_S)
        except grpc.FutureTimeoutError:
            if time.monotonic() - moved > within_s:
                under_way.cancel()
                raise UnreachableError(f"the server has taken nothing and said nothing for {within_s:.0f} s") from None
