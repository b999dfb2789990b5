"""Seconds that a process spends in functions that only keep accounts, whichever thread calls them.

Knows functions by the modules and classes that hold them; changes nothing of what they do. Seconds are of the thread's
own processor time, so that what other threads do meanwhile is not in them; nor is what measuring a call of
nothing takes.
"""

import importlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Final

EDGE: Final = (
    "isthmus.ledger.record:Ledger.add",
    "isthmus.ledger.record:Ledger.add_at",
    "isthmus.ledger.record:Ledger.peak",
    "isthmus.ledger.record:Ledger.close_step",
    "isthmus.ledger.record:Ledger.totals",
    "isthmus.ledger.flops:PassFlops.of",
    "isthmus.ledger.memory:TensorPeak._pack",
    "isthmus.ledger.memory:TensorPeak._read_modules",
    "isthmus.ledger.memory:TensorPeak.hold",
    "isthmus.ledger.memory:TensorPeak.begin_anew",
    "isthmus.ledger.memory:_Saved.unpack",
    "isthmus.ledger.memory:_Saved.__del__",
    "edge_client.train:peak_bytes",
    "edge_client.train:reset_peak",
    "edge_client.stream:sent_bytes",
    "edge_client.link:sent_bytes",
    "edge_client.link:place_of",
)
"""What keeps accounts in `edge_client train`."""

CLOUD: Final = (
    "isthmus.ledger.flops:PassFlops.of",
    "cloud_node.exchange:sent_bytes",
    "cloud_node.outgoing:sent_bytes",
    "cloud_node.watch:SessionWatch.received",
    "cloud_node.watch:SessionWatch.sent",
    "cloud_node.watch:SessionWatch.computed",
    "cloud_node.watch:SessionWatch.answered",
)
"""What keeps accounts in `cloud_node serve`."""


def _nothing(*_: Any, **__: Any) -> None:
    """What measuring costs is found beside each call."""


class Meter:
    """Counts calls and seconds of functions; a call within another counts with the outer one."""

    def __init__(self, names: Iterable[str]) -> None:
        """Stand around functions named `module:attribute` until the process ends."""
        self._lock = threading.Lock()
        self._inside = threading.local()
        self._calls: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._processor: list[float] = []
        for name in names:
            module, _, path = name.partition(":")
            *holders, last = path.split(".")
            holder = importlib.import_module(module)
            for part in holders:
                holder = getattr(holder, part)
            setattr(holder, last, self._metered(path, getattr(holder, last)))

    def taken(self) -> dict[str, dict[str, float]]:
        """Calls and seconds by function since the last time."""
        with self._lock:
            found = {name: {"calls": self._calls[name], "seconds": self._seconds[name]} for name in self._calls}
            self._calls, self._seconds = Counter(), Counter()
        return found

    @property
    def processor_s(self) -> float:
        """Processor time of the whole process from the first call to the last."""
        return self._processor[-1] - self._processor[0] if self._processor else 0.0

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def metered(*given: Any, **named: Any) -> Any:
            if getattr(self._inside, "already", False):
                return function(*given, **named)
            self._inside.already = True
            reading = time.thread_time()
            _nothing(*given, **named)
            began = time.thread_time()
            try:
                return function(*given, **named)
            finally:
                spent = max(0.0, time.thread_time() - began - (began - reading))
                self._inside.already = False
                with self._lock:
                    self._processor[1:] = [time.process_time()]
                    self._calls[name] += 1
                    self._seconds[name] += spent

        return metered
