"""What a node counts while it serves: sessions, requests, bytes, work, time and errors.

Knows figures under names that are settled beforehand, and which session each belongs to; no tensors, no Prometheus and
no HTTP. The event loop alone writes; any thread may read.
"""

import logging
import time
from bisect import bisect_left
from itertools import accumulate

from cloud_node.session import Session
from isthmus.errors import IsthmusError, catalogue
from isthmus.wire.gen import backbone_pb2 as pb

log = logging.getLogger(__name__)

PASSES = {
    pb.PASS_FORWARD: "forward",
    pb.PASS_BACKWARD: "backward",
    pb.PASS_DECODE: "decode",
    pb.PASS_PARK: "park",
    pb.PASS_VALUES: "values",
    pb.PASS_GRADIENTS: "gradients",
    pb.PASS_UNSPECIFIED: "other",
}

OUTCOMES = ("answered", "refused", "failed")

KINDS = ("train", "forward-only", "side", "dlora")
"""What sessions are opened for: `side` has taps, `dlora` adapters of the edge."""

EXCHANGE = "exchange"

ROUNDS = ("round-join", "round-keys", "round-submit", "round-result")
CALLS = ("describe", "fetch-ends", "list-emulators", "fetch-emulator", "submit", *ROUNDS)
"""The contract's calls beside `exchange`."""

DIRECTIONS = ("in", "out")

FLOPS = ("forward", "recompute", "backward")
"""`recompute` are forwards run again for a backward; the three have nothing in common."""

STAGES = ("duration", "queue", "compute")
"""Of a request's time: until its answer is ready, waiting at ports included; waiting for the device; computing."""

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Durations:
    """How many took how long: a histogram over `BOUNDS_S`."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def cumulative(self) -> list[int]:
        """How many took at most each bound, and last how many there were."""
        return list(accumulate(self._counts))


class Watch:
    """The figures of one node since it started. Every name under which something is counted is there from the start."""

    def __init__(self) -> None:
        self.sessions: dict[str, SessionWatch] = {}
        passes = PASSES.values()
        self.requests = {(each, outcome): 0 for each in passes for outcome in OUTCOMES}
        self.durations = {(stage, each): Durations() for stage in STAGES for each in passes}
        self.calls = {(call, outcome): 0 for call in CALLS for outcome in OUTCOMES}
        self.bytes = {(call, direction): 0 for call in (EXCHANGE, *CALLS) for direction in DIRECTIONS}
        self.flops = dict.fromkeys(FLOPS, 0)
        self.errors = dict.fromkeys(sorted(catalogue()), 0)

    def of(self, session: Session) -> "SessionWatch":
        """The figures of a session, from now on if it is new."""
        return self.sessions.setdefault(session.name, SessionWatch(self, session))

    def forget(self, session: Session) -> None:
        """Drop a session that was closed; what it did stays in the node's figures."""
        self.sessions.pop(session.name, None)

    def error(self, error: BaseException) -> None:
        """Count an error by its name in the catalogue; what has none there is an internal one."""
        code = error.code if isinstance(error, IsthmusError) else IsthmusError.code
        self.errors[code if code in self.errors else IsthmusError.code] += 1

    @property
    def answered(self) -> int:
        """Requests that were answered, in all."""
        return sum(count for (_, outcome), count in self.requests.items() if outcome == "answered")

    def in_all(self, direction: str) -> int:
        """Bytes of all calls in a direction."""
        return sum(self.bytes[call, direction] for call in (EXCHANGE, *CALLS))


class SessionWatch:
    """The figures of one session; they count for its node as well."""

    def __init__(self, node: Watch, session: Session) -> None:
        self._node = node
        self.session = session
        self.opened = self.active = time.time()
        self.streams = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self.answered_requests = 0
        self.refused_requests = 0
        self.tokens = 0
        self.flops = 0
        self.seconds = 0.0

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.session.ports:
            return "dlora" if self.session.round_trips or self.session.valued else "side"
        return "forward-only" if self.session.forward_only else "train"

    def figures(self) -> dict[str, int | float]:
        """What its lines in the audit log count, from its opening on."""
        return {
            "requests": self.answered_requests,
            "refused": self.refused_requests,
            "tokens": self.tokens,
            "received_bytes": self.received_bytes,
            "sent_bytes": self.sent_bytes,
            "flops": self.flops,
            "seconds": self.seconds,
        }

    def received(self, size: int) -> None:
        """A frame came."""
        self.active = time.time()
        self.received_bytes += size
        self._node.bytes[EXCHANGE, "in"] += size

    def sent(self, size: int) -> None:
        """A frame goes."""
        self.sent_bytes += size
        self._node.bytes[EXCHANGE, "out"] += size

    def computed(self, key: pb.Key, cost: pb.Cost) -> None:
        """A request ran; one that was sent twice meanwhile runs once."""
        self.flops += cost.forward_flops + cost.backward_flops
        self.seconds += cost.forward_s + cost.backward_s
        self._node.flops["forward"] += cost.forward_flops - cost.recompute_flops
        self._node.flops["recompute"] += cost.recompute_flops
        self._node.flops["backward"] += cost.backward_flops
        self._node.durations["queue", pass_of(key)].add(cost.queue_s)
        self._node.durations["compute", pass_of(key)].add(cost.forward_s + cost.backward_s)

    def answered(self, call: pb.Call, seconds: float) -> None:
        """A request's answer is ready, so many seconds after all of it was here."""
        self.answered_requests += 1
        if call.key.pass_kind in (pb.PASS_FORWARD, pb.PASS_DECODE):
            self.tokens += sum(call.rows.row_lengths)
        self._node.requests[pass_of(call.key), "answered"] += 1
        self._node.durations["duration", pass_of(call.key)].add(seconds)
        log.debug("%s answered in %.4f s", self._named(call.key), seconds, extra=self._fields(call))

    def refused(self, call: pb.Call, error: IsthmusError) -> None:
        """A request ended in an error of the catalogue."""
        self.refused_requests += 1
        self._node.requests[pass_of(call.key), "refused"] += 1
        self._node.error(error)
        fields, what = self._fields(call) | {"error": error.code}, " ".join(str(error).split())
        log.info("%s refused (%s): %s", self._named(call.key), error.code, what, extra=fields)

    def broken(self, error: BaseException, call: pb.Call | None = None) -> None:
        """The stream ends by an error; `call` is the request that failed, where one did."""
        self._node.error(error)
        if call is not None:
            self._node.requests[pass_of(call.key), "failed"] += 1
        if isinstance(error, IsthmusError):
            fields, what = self._fields(call) | {"error": error.code}, " ".join(str(error).split())
            log.warning("the stream of session %s ended: %s", self.session.name, what, extra=fields)
        else:
            fields = self._fields(call) | {"error": IsthmusError.code}
            log.error("session %s: failed unexpectedly", self.session.name, exc_info=error, extra=fields)

    def _named(self, key: pb.Key) -> str:
        return f"session {self.session.name}: {pass_of(key)} of microbatch {key.microbatch}"

    def _fields(self, call: pb.Call | None = None) -> dict[str, object]:
        """What a line of the log names; see `cloud_node.logs`."""
        fields: dict[str, object] = {"session": self.session.name, "tenant": self.session.identity}
        if call is None:
            return fields
        fields |= {"microbatch": call.key.microbatch, "pass": pass_of(call.key)}
        return fields | {"step": call.step} if call.step else fields


def pass_of(key: pb.Key) -> str:
    """A pass by name; one that does not exist is `other`."""
    return PASSES.get(key.pass_kind, PASSES[pb.PASS_UNSPECIFIED])
