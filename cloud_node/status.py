"""What a node tells of itself: whether it is ready, and the figures of the status page.

Knows the service, its watch and its engine's load, and that there is no service while the model is being loaded. What
is told may be read by anyone who reaches the port: no identities, no names of sessions but as short hashes, no paths,
and nothing of what was sent.
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
from cloud_node.watch import KINDS, OUTCOMES, PASSES, STAGES, SessionWatch, Watch
from isthmus import PROTOCOL, __version__
from isthmus.device import runtime
from isthmus.ledger.memory import peak_bytes, resident_bytes
from isthmus.wire.codecs import CODECS

log = logging.getLogger(__name__)

ANSWER_WITHIN_S = 2.0
"""An engine that does not tell its load in this time is not ready."""

TOKEN_WITHIN_S = 0.5
"""A token that is not through by then is judged without: probes have 3 seconds in all."""

LOADING = "loading the model"
"""What a node is missing while there is no service yet."""

SHOWN_SESSIONS = 100
"""The page shows so many, those first that were active last."""

NAME_BYTES = 4
"""Of the hash that stands for a session's name: who knows a name could join a session of a node without certificates,
and clients may choose short ones. Who guesses a name can still tell that a session has it."""


class Status:
    """Reads a service, once there is one; any thread may ask.

    Attributes:
        service: what is read; None while it is being loaded.
        certificate_until: when the server's certificate expires, in seconds since 1970; None where there is none.
        started: when the process was, in seconds since 1970.
    """

    def __init__(self, certificate_until: float | None = None) -> None:
        self.service: BackboneService | None = None
        self.certificate_until = certificate_until
        self.started = time.time()
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="status")
        self._asked: Future[Load] | None = None

    def load(self) -> Load | None:
        """The engine's load; None where it does not answer. It is never asked twice at once."""
        service = self.service
        if service is None:
            return None
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = self._thread.submit(service.load)
            asked = self._asked
        try:
            error = asked.exception(ANSWER_WITHIN_S)
        except TimeoutError:
            return None
        if error is not None:
            log.warning("the engine does not tell its load: %s", " ".join(str(error).split()))
            return None
        return asked.result()

    def missing(self, load: Load | None) -> str | None:
        """Why requests would not be answered by an engine that told this load; None: they would be.

        A real token is run for it, now and then: see `cloud_node.health`.
        """
        if self.service is None:
            return LOADING
        if self.service.draining:
            return "draining"
        if load is None:
            return "the engine does not answer"
        if load.replicas < 1:
            return "no copy of the span runs"
        return self.service.health.missing(TOKEN_WITHIN_S)

    def wedged(self) -> bool:
        """Whether only a new process will help: copies of the span run, and nothing has come out for very long."""
        load = self.load()
        if self.service is None or load is None or load.replicas < 1:
            return False
        self.service.health.missing(0.0)
        return self.service.health.wedged

    def figures(self) -> dict[str, Any]:
        """Everything that the page shows, as JSON has it; while the model is being loaded, what is known by then."""
        service, load, now = self.service, self.load(), time.time()
        missing = self.missing(load)
        node = {
            "ready": missing is None,
            "missing": missing,
            "draining": service is not None and service.draining,
            "uptime_s": now - self.started,
            "certificate_s": None if self.certificate_until is None else self.certificate_until - now,
            "versions": {"isthmus": __version__, "protocol": PROTOCOL},
            "memory": {"resident_bytes": resident_bytes(), "peak_bytes": peak_bytes()},
        }
        return (
            node if service is None else node | {"model": _model(service), "load": _load(load), **_work(service, now)}
        )


def sessions_by_kind(watch: Watch) -> dict[str, int]:
    """How many sessions are open, for each of `KINDS`."""
    counted = Counter(seen.kind for seen in list(watch.sessions.values()))
    return {kind: counted[kind] for kind in KINDS}


def streams(watch: Watch) -> int:
    """How many streams are open; a session that lost its line has none."""
    return sum(seen.streams for seen in list(watch.sessions.values()))


def _model(service: BackboneService) -> dict[str, Any]:
    card, model = service.describe(), service.model
    return {
        "name": model.name,
        "digest": model.digest,
        "blocks": model.blocks,
        "hidden_size": card.hidden_size,
        "cuts": [str(cut) for cut in card.cuts],
        "dtype": card.dtype,
        "device": card.device,
        "runtime": runtime(card.device),
        "engine": card.engine,
        "codecs": list(CODECS),
        "limits": asdict(service.limits),
    }


def _work(service: BackboneService, now: float) -> dict[str, Any]:
    """What it did since it serves, and for whom it does it now."""
    watch, audit = service.watch, service.audit.end
    sessions = sorted(watch.sessions.values(), key=lambda seen: seen.active, reverse=True)
    return {
        "sessions": {
            "open": len(sessions),
            "by_kind": sessions_by_kind(watch),
            "streams": streams(watch),
            "shown": [_session(seen, now) for seen in sessions[:SHOWN_SESSIONS]],
        },
        "bytes": {"in": watch.in_all("in"), "out": watch.in_all("out")},
        "passes": {name: _pass(watch, name) for name in PASSES.values()},
        "calls": {call: count for (call, outcome), count in watch.calls.items() if outcome == "answered"},
        "flops": watch.flops,
        "audit": None if audit is None else {"line": audit.number, "hash": audit.hash},
        "errors": {kind: count for kind, count in watch.errors.items() if count},
    }


def _pass(watch: Watch, name: str) -> dict[str, Any]:
    """How requests of a pass ended, and their mean seconds; None where there were none."""
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
    stages = [{"place": place, **(_load(each) or {})} for place, each in load.stages]
    return {**vars(load), "batches": batches, "stages": stages}
