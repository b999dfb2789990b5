"""A call that brings messages one after another, ended when none comes any more.

Knows calls and seconds. What a server that answers pings, and nothing else, would keep waiting for ever ends here.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

STALLED_S = 60.0
"""A message is at most 1 MiB."""


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
