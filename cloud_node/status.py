"""What a node tells of itself: whether it is ready, and the figures of the status page.

Knows the service, its watch and its engine's load. What is told may be read by anyone who reaches the port: no
identities, no names of sessions but as short hashes, no paths, and nothing of what was sent.
"""

import hashlib
import logging
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from threading import Lock
from typing import Any

from cloud_node.engine import Load
from cloud_node.service import BackboneService
from cloud_node.watch import KINDS, OUTCOMES, PASSES, STAGES, SessionWatch
from isthmus import PROTOCOL, __version__
from isthmus.ledger.memory import peak_bytes, resident_bytes
from isthmus.settings import runtime
from isthmus.wire.codecs import CODECS

log = logging.getLogger(__name__)

ANSWER_WITHIN_S = 2.0
"""An engine that does not tell its load in this time is not ready."""

SHOWN_SESSIONS = 100
"""The page shows so many, those first that were active last."""

NAME_BYTES = 4
"""Of the hash that stands for a session's name: who knows a name could join a session of a node without certificates,
and clients may choose short ones. Who guesses a name can still tell that a session has it."""


class Status:
    """Reads a service that is running; any thread may ask."""

    def __init__(self, service: BackboneService) -> None:
        self.service = service
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="status")
        self._asked: Future[Load] | None = None

    def load(self) -> Load | None:
        """The engine's load; None where it does not answer. It is never asked twice at once."""
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = self._thread.submit(self.service.load)
            asked = self._asked
        try:
            error = asked.exception(ANSWER_WITHIN_S)
        except TimeoutError:
            return None
        if error is not None:
            log.warning("the engine does not tell its load: %s", " ".join(str(error).split()))
            return None
        return asked.result()

    def ready(self) -> bool:
        """Whether requests would be answered."""
        return self.missing(self.load()) is None

    def missing(self, load: Load | None) -> str | None:
        """Why requests would not be answered by an engine that told this load; None: they would be."""
        if self.service.draining:
            return "draining"
        if load is None:
            return "the engine does not answer"
        return None if load.replicas > 0 else "no copy of the span runs"

    def sessions_by_kind(self) -> dict[str, int]:
        """How many sessions are open, for each of `KINDS`."""
        counted = Counter(seen.kind for seen in self._sessions())
        return {kind: counted[kind] for kind in KINDS}

    def streams(self) -> int:
        """How many streams are open; a session that lost its line has none."""
        return sum(seen.streams for seen in self._sessions())

    def figures(self) -> dict[str, Any]:
        """Everything that the page shows, as JSON has it."""
        watch, load, now = self.service.watch, self.load(), time.time()
        missing = self.missing(load)
        sessions = sorted(self._sessions(), key=lambda seen: seen.active, reverse=True)
        return {
            "ready": missing is None,
            "missing": missing,
            "draining": self.service.draining,
            "uptime_s": now - watch.started,
            "model": self._model(),
            "versions": self._versions(),
            "sessions": {
                "open": len(sessions),
                "by_kind": self.sessions_by_kind(),
                "streams": self.streams(),
                "shown": [_session(seen, now) for seen in sessions[:SHOWN_SESSIONS]],
            },
            "load": _load(load),
            "memory": {"resident_bytes": resident_bytes(), "peak_bytes": peak_bytes()},
            "bytes": {"in": watch.in_all("in"), "out": watch.in_all("out")},
            "passes": {name: self._pass(name) for name in PASSES.values()},
            "calls": {call: count for (call, outcome), count in watch.calls.items() if outcome == "answered"},
            "flops": watch.flops,
            "errors": {kind: count for kind, count in watch.errors.items() if count},
        }

    def _sessions(self) -> list[SessionWatch]:
        return list(self.service.watch.sessions.values())

    def _model(self) -> dict[str, Any]:
        card, model = self.service.describe(), self.service.model
        return {
            "name": model.name,
            "digest": model.digest,
            "blocks": model.blocks,
            "hidden_size": card.hidden_size,
            "cuts": [str(cut) for cut in card.cuts],
            "dtype": card.dtype,
            "device": card.device,
            "codecs": list(CODECS),
            "limits": asdict(self.service.limits),
        }

    def _versions(self) -> dict[str, Any]:
        return {"isthmus": __version__, "protocol": PROTOCOL, "runtime": runtime(self.service.describe().device)}

    def _pass(self, name: str) -> dict[str, Any]:
        """How requests of a pass ended, and their mean seconds; None where there were none."""
        watch = self.service.watch
        figures: dict[str, Any] = {outcome: watch.requests[name, outcome] for outcome in OUTCOMES}
        for stage in STAGES:
            durations = watch.durations[stage, name]
            count = durations.cumulative()[-1]
            figures[f"mean_{stage}_s"] = durations.total_s / count if count else None
        return figures


def shown_name(name: str) -> str:
    """What stands for a session's name where anyone may read: 8 hexadecimal digits of its BLAKE2b hash (RFC 7693)."""
    return hashlib.blake2b(name.encode(), digest_size=NAME_BYTES).hexdigest()


def _session(seen: SessionWatch, now: float) -> dict[str, Any]:
    session = seen.session
    codecs = (session.codec_activation, session.codec_gradient, session.codec_port)
    return {
        "name": shown_name(session.name),
        "kind": seen.kind,
        "cut": str(session.cut),
        "ports": len(session.ports),
        "codecs": [codec for codec in codecs if codec],
        "deterministic": session.deterministic,
        "connected": seen.streams > 0,
        "answered": seen.answered_requests,
        "refused": seen.refused_requests,
        "in_bytes": seen.received_bytes,
        "out_bytes": seen.sent_bytes,
        "open_s": now - seen.opened,
        "idle_s": now - seen.active,
    }


def _load(load: Load | None) -> dict[str, Any] | None:
    if load is None:
        return None
    batches = {str(size): times for size, times in sorted(load.batches.items())}
    return {**vars(load), "batches": batches}
