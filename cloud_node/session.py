"""Sessions: who owns which, what each was opened for, and which requests it has seen.

Knows identities, ids and digests; knows no model and no transport.
"""

import asyncio
import hashlib
import re
from collections import OrderedDict
from concurrent.futures import Executor
from dataclasses import dataclass, field

from cloud_node.asks import Asks
from cloud_node.engine import EngineCard, Opening
from isthmus import PROTOCOL
from isthmus.cut import Cut
from isthmus.errors import (
    CutError,
    IsthmusError,
    LimitError,
    ModelError,
    OwnerError,
    RepeatError,
    UsageError,
    VersionError,
    WireError,
)
from isthmus.ports import ASKING, TAP, VALUES, Port, check_ports
from isthmus.wire.codecs import CODECS
from isthmus.wire.gen import backbone_pb2 as pb

REMEMBERED = 1 << 16
"""Requests whose digests a session remembers; a repeat from further back counts as new."""

SESSIONS_PER_IDENTITY = 64
WAITING_PER_IDENTITY = 16
"""Of them, sessions whose passes wait for the edge: each has threads of its own."""

AGAIN_S = 5.0
"""When to come again where there are too many."""

SESSION_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

RequestId = tuple[int, int]


@dataclass
class Session:
    """One client's session. `running` holds answers under way, so that a repeated request joins the first."""

    name: str
    identity: str
    cut: Cut
    codec_activation: str
    codec_gradient: str
    forward_only: bool
    ports: tuple[Port, ...]
    codec_port: str
    deterministic: bool = False
    asks: Asks = field(default_factory=Asks)  # questions at ports that wait for the edge
    pool: Executor | None = None  # of its own, where passes wait for the edge: others have the node's
    running: dict[RequestId, "asyncio.Task[tuple[pb.Reply, list[memoryview]]]"] = field(default_factory=dict)
    _digests: OrderedDict[RequestId, bytes] = field(default_factory=OrderedDict)

    @property
    def round_trips(self) -> bool:
        """Whether passes wait for the edge while they run."""
        return any(port.kind in ASKING for port in self.ports)

    @property
    def tapped(self) -> bool:
        """Whether its ports are taps."""
        return any(port.kind == TAP for port in self.ports)

    @property
    def valued(self) -> bool:
        """Whether adapters' values come for a step."""
        return any(port.kind in VALUES for port in self.ports)

    @property
    def opening(self) -> Opening:
        """What the engine is told of it."""
        return Opening(self.cut, self.ports, self.identity, self.deterministic)

    @property
    def purpose(self) -> tuple[object, ...]:
        """What it was opened for."""
        codecs = (self.codec_activation, self.codec_gradient, self.codec_port)
        return self.cut, codecs, self.forward_only, self.ports, self.deterministic

    def end(self, error: IsthmusError) -> None:
        """Fail the passes that wait for the edge, and free their threads."""
        self.asks.end(error)
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def admit(self, call: pb.Call) -> None:
        """Note a request; the same id with the same content may come again.

        Raises:
            RepeatError: the id was used with other content.
        """
        request, digest = request_id(call.key), digest_of(call)
        known = self._digests.setdefault(request, digest)
        self._digests.move_to_end(request)
        if known != digest:
            raise RepeatError(f"microbatch {request[0]} was already sent with other content; use a new id")
        if len(self._digests) > REMEMBERED:
            self._digests.popitem(last=False)


def request_id(key: pb.Key) -> RequestId:
    """A request's id as a dictionary key."""
    return key.microbatch, key.pass_kind


def digest_of(call: pb.Call, whole: bool = False) -> bytes:
    """What a request asks, its tensors by checksum; an input that a backward brings again only if `whole`."""
    content = pb.Call()
    content.CopyFrom(call)
    if call.key.pass_kind == pb.PASS_BACKWARD and not whole:
        del content.tensors[1:]
        content.ClearField("rows")
    content.DiscardUnknownFields()
    return hashlib.blake2b(content.SerializeToString(deterministic=True), digest_size=16).digest()


class Registry:
    """All sessions of a node, by name; each belongs to the identity that opened it."""

    def __init__(self, card: EngineCard, model_digest: str, blocks: int) -> None:
        self._card = card
        self._cuts = card.cuts
        self._model_digest = model_digest
        self._blocks = blocks
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, identity: str, request: pb.Open) -> Session:
        """Open a session, or find it again after a lost connection.

        Raises:
            VersionError, UsageError, CutError, ModelError, WireError: the request does not fit what is served.
            OwnerError: the name belongs to another identity.
            LimitError: the identity has too many sessions, or the session's taps are too wide.
        """
        session = self._read(identity, request)
        known = self._sessions.get(request.session)
        if known is None:
            if sum(other.identity == identity for other in self._sessions.values()) >= SESSIONS_PER_IDENTITY:
                raise LimitError(f"{identity} has {SESSIONS_PER_IDENTITY} open sessions; close one or wait", AGAIN_S)
            waiting = sum(other.identity == identity and other.round_trips for other in self._sessions.values())
            if session.round_trips and waiting >= WAITING_PER_IDENTITY:
                raise LimitError(
                    f"{identity} has {WAITING_PER_IDENTITY} sessions with lora or core ports; close one or wait",
                    AGAIN_S,
                )
            return self._sessions.setdefault(session.name, session)
        if known.identity != identity:
            raise OwnerError(f"session {session.name} belongs to another identity")
        if known.purpose != session.purpose:
            raise RepeatError(f"session {session.name} was opened for something else; use a new name")
        return known

    def sessions(self) -> list[Session]:
        """All sessions that are open."""
        return list(self._sessions.values())

    def forget(self, session: Session) -> None:
        """Drop a session."""
        self._sessions.pop(session.name, None)

    def _read(self, identity: str, request: pb.Open) -> Session:
        require_protocol(request.protocol)
        if not SESSION_NAME.fullmatch(request.session):
            raise UsageError("a session's name is 1 to 64 letters, digits, dots, dashes or underscores")
        cut = Cut(request.bottom, request.top)
        if cut not in self._cuts:
            raise CutError(f"cut {cut} is not offered; use one of {', '.join(map(str, self._cuts))}")
        if request.model_digest != self._model_digest:
            raise ModelError(
                "the server holds another model than these ends were made from; run again to fetch its own"
            )
        ports = self._ports(request, cut)
        if not ports and request.codec_port:
            raise UsageError("a codec for ports goes with ports; leave it out")
        codecs = [request.codec_activation, request.codec_gradient]
        for codec in [*codecs, request.codec_port] if ports else codecs:
            if codec not in CODECS:
                raise UsageError(f"no codec {codec!r:.40}; use one of {', '.join(CODECS)}")
        return Session(
            request.session,
            identity,
            cut,
            request.codec_activation,
            request.codec_gradient,
            request.forward_only,
            ports,
            request.codec_port,
            request.deterministic,
        )

    def _ports(self, request: pb.Open, cut: Cut) -> tuple[Port, ...]:
        most = self._blocks + len(self._card.linears)
        if len(request.ports) > most:
            raise WireError(f"{len(request.ports)} ports; the model has room for {most}")
        ports = tuple(Port.from_wire(port) for port in request.ports)
        check_ports(ports, cut, self._blocks, self._card.hidden_size, self._card.linears)
        if any(port.kind == TAP for port in ports) and not request.forward_only:
            raise UsageError("taps are for forward-only sessions; open the session as one")
        return ports


def require_protocol(theirs: int) -> None:
    """Refuse a peer of another protocol.

    Raises:
        VersionError: the versions differ.
    """
    if theirs != PROTOCOL:
        raise VersionError(
            f"the client speaks protocol {theirs} and this server {PROTOCOL}; install the same isthmus version on both"
        )
