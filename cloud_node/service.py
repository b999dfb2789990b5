"""The gRPC face of a cloud node: describe, fetch the ends, exchange; and an orderly end.

Knows transport, identities and who may open what; the exchange handles a stream's frames, the engine computes.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from cloud_node.audit import Audit
from cloud_node.calls import Limits
from cloud_node.card import Ends, model_card
from cloud_node.engine import Engine, EngineCard, Load
from cloud_node.exchange import SessionStream
from cloud_node.health import Health
from cloud_node.policy.authority import Authority
from cloud_node.revoked import Revoked
from cloud_node.sending import abort, bundle_frames
from cloud_node.session import Registry, Session, require_protocol
from cloud_node.watch import Watch
from isthmus.bundle import Manifest
from isthmus.cut import Cut
from isthmus.errors import (
    BundleError,
    CertificateError,
    DrainingError,
    ForbiddenError,
    IsthmusError,
    UnreachableError,
    WireError,
)
from isthmus.trust.credentials import peer_certificate, peer_identity
from isthmus.wire.frames import Chunk
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.options import TIME
from isthmus.wire.status import failure

log = logging.getLogger(__name__)

OPEN_WITHIN_S = 30.0
LINGER_S = 300.0
"""How long a session whose stream broke waits for its client to come back."""

COMPUTE_THREADS = 32
"""Requests of one identity under way at once; the engine lets them take turns with those of others."""

WAITING_THREADS = 16
"""Requests under way at once in a session whose passes wait for the edge."""


@dataclass(frozen=True)
class Model:
    """What the card says of the model, and the folder of each cut's bundle of ends."""

    name: str
    digest: str
    config_json: str
    blocks: int
    ends: Mapping[Cut, Path]


class BackboneService:
    """Answers the three calls of the contract for one engine.

    Attributes:
        limits: what a session may ask at once.
        watch: counts what is done.
        audit: keeps who did it.
        revoked: who is no longer let in.
        health: whether the engine answers.
        draining: nothing new is taken any more.
        authority: says who may do what; without one everybody may do everything.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        limits: Limits,
        linger_s: float = LINGER_S,
        authority: Authority | None = None,
        audit: Audit | None = None,
        revoked: Revoked | None = None,
    ) -> None:
        """Serve `engine` as `model`."""
        self.authority = authority or Authority()
        self._engine = engine
        self._model = model
        self.limits = limits
        self.watch = Watch()
        self.health = Health(engine, lambda: self.watch.answered)
        self.audit = audit or Audit()
        self.revoked = revoked or Revoked(None)
        self.draining = False
        self._linger_s = linger_s
        self._ends = Ends(model.ends)
        self._registry = Registry(engine.describe(), model.digest, model.blocks)
        self._streams: dict[str, SessionStream] = {}
        self._lingering: dict[str, asyncio.TimerHandle] = {}
        self._pools: dict[str, ThreadPoolExecutor] = {}  # by identity, while it has sessions

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.ModelCard:  # noqa: N802 (gRPC's name)
        """The model card, as whoever asks may see it."""
        identity = peer_identity(context.auth_context())
        try:
            require_protocol(request.protocol)
            card = model_card(self._model, self._engine.describe(), self._ends, self.limits, identity)
            shown = self.authority.card(identity, card)
        except IsthmusError as error:
            await abort(context, error)
        await context.send_initial_metadata(((TIME, f"{time.time():.3f}"),))
        return shown

    async def FetchEnds(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.BundleFrame]:  # noqa: N802
        """A bundle from any offset on; its manifest and signature first."""
        identity = peer_identity(context.auth_context())
        try:
            found = self._found(identity, request.bundle)
        except IsthmusError as error:
            await abort(context, error)
        async for frame in bundle_frames(*found, request.offset, context, partial(self.authority.paced, identity)):
            yield frame

    def _found(self, identity: str, bundle_id: str) -> tuple[Path, Manifest]:
        self.authority.rights(identity)
        found = self._ends.find(bundle_id)
        if found is None:
            raise BundleError("no such bundle is served; ask for the model card again")
        self.authority.require_cut(identity, found[0])
        return found[1:]

    async def Exchange(  # noqa: N802
        self, frames: AsyncIterator[pb.ClientFrame | Chunk], context: Any
    ) -> AsyncIterator[pb.ServerFrame | Chunk]:
        """One session's stream."""
        peer = context.auth_context()
        try:
            serial = self.revoked.require(peer)
            first = await asyncio.wait_for(anext(aiter(frames)), OPEN_WITHIN_S)
            session = self._open(first, peer_identity(peer), peer_certificate(peer))
        except (StopAsyncIteration, TimeoutError):
            return
        except (DecodeError, IsthmusError) as error:
            yield self._refusal(error, peer_identity(peer), peer_certificate(peer))
            return
        exchange = self._attach(session, first)
        exchange.serial = serial
        reader = asyncio.get_running_loop().create_task(exchange.read(frames))
        in_order = False
        try:
            async for frame in exchange.write():
                yield frame
            in_order = exchange.closed_by_client  # on a lost line reading ends in order too, but writing is cancelled
        finally:
            reader.cancel()
            exchange.cancel()
            self._detach(session, exchange, in_order)

    @property
    def model(self) -> Model:
        """Which model that is."""
        return self._model

    def describe(self) -> EngineCard:
        """What the engine serves."""
        return self._engine.describe()

    def load(self) -> Load:
        """What the engine is busy with."""
        return self._engine.load()

    def enforce(self) -> None:
        """End the sessions that the policy allows no more."""
        for session in self._registry.sessions():
            try:
                self.authority.require_session(session.identity, session)
            except ForbiddenError as error:
                if exchange := self._streams.pop(session.name, None):
                    exchange.end(error)
                if timer := self._lingering.pop(session.name, None):
                    timer.cancel()
                self._forget(session)

    async def drain(self, grace_s: float) -> None:
        """Tell every session, finish what is under way, and wait for the streams to end; at most `grace_s` seconds."""
        self.draining = True
        for exchange in list(self._streams.values()):
            exchange.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._streams:
                    await asyncio.sleep(0.02)
        for session in self._registry.sessions():
            session.end(DrainingError("the server is shutting down; send the request again when it is back"))

    def end_revoked(self) -> None:
        """End the streams of callers whose certificate was revoked since they came."""
        for exchange in list(self._streams.values()):
            if (why := self.revoked.why_not(exchange.serial)) is not None:
                exchange.end(CertificateError(why))

    def tell_so_far(self) -> None:
        """Write down what each session has used, so that a node that is killed loses little of it."""
        for seen in list(self.watch.sessions.values()):
            self.audit.record("so-far", seen.session.identity, "ok", seen.session.name, **seen.figures())

    def _refusal(self, error: DecodeError | IsthmusError, identity: str, certificate: str) -> pb.ServerFrame:
        """The answer to a stream that opens no session."""
        if isinstance(error, DecodeError):
            error = WireError("what was sent is no frame of this protocol")
        self.watch.error(error)
        self.audit.record("open", identity, error.code, certificate=certificate)
        fields = {"tenant": identity, "error": error.code}
        log.warning("a session of %s refused: %s", identity, " ".join(str(error).split()), extra=fields)
        return pb.ServerFrame(failure=failure(error))

    def stop(self) -> None:
        """Let the engine go; nothing is answered afterwards."""
        for session in self._registry.sessions():
            self._write_off(session, DrainingError.code)
        self._engine.stop()

    def _open(self, first: pb.ClientFrame | Chunk, identity: str, certificate: str) -> Session:
        if isinstance(first, Chunk) or not first.HasField("open"):
            raise WireError("a stream begins with an open frame")
        if self.draining:
            raise DrainingError("the server is shutting down; try again when it is back")
        if first.open.deterministic and not self._engine.describe().device.startswith("cpu"):
            raise ForbiddenError("bit-identical sessions are promised on CPUs alone, and this server computes on a GPU")
        self.authority.open(identity, first.open, self._registry.sessions())
        self.audit.require()
        known = len(self._registry)
        session = self._registry.open(identity, first.open)
        if session.round_trips and session.pool is None:
            session.pool = ThreadPoolExecutor(WAITING_THREADS, thread_name_prefix="waiting")
        if identity not in self._pools:
            self._pools[identity] = ThreadPoolExecutor(COMPUTE_THREADS, thread_name_prefix="compute")
        try:
            self._engine.open(session.name, session.opening)
        except BaseException:
            if len(self._registry) > known:  # nobody has a stream that would end it
                self._forget(session)
            raise
        if len(self._registry) > known:
            told = {"kind": self.watch.of(session).kind, "cut": str(session.cut), "certificate": certificate}
            self.audit.record("open", identity, thing=session.name, **told)
        fields = {"session": session.name, "tenant": identity}
        log.info("session %s opened by %s at cut %s", session.name, identity, session.cut, extra=fields)
        return session

    def _attach(self, session: Session, first: pb.ClientFrame | Chunk) -> SessionStream:
        pool = self._pools[session.identity]
        exchange = SessionStream(session, self._engine, self.limits, pool, self.watch, self.authority)
        exchange.count_received(first)
        if timer := self._lingering.pop(session.name, None):
            timer.cancel()
        earlier = self._streams.get(session.name)
        self._streams[session.name] = exchange
        if earlier is not None:
            earlier.end(DrainingError("the session was opened on another stream"))
        return exchange

    def _detach(self, session: Session, exchange: SessionStream, in_order: bool) -> None:
        if self._streams.get(session.name) is not exchange:
            return  # the session goes on on a newer stream
        del self._streams[session.name]
        if in_order:
            self._forget(session)
        else:
            loop = asyncio.get_running_loop()
            self._lingering[session.name] = loop.call_later(self._linger_s, self._forget, session)

    def _forget(self, session: Session) -> None:
        self._lingering.pop(session.name, None)
        self._registry.forget(session)
        session.end(UnreachableError("the session was closed"))
        self._engine.close(session.name)
        here = {other.identity for other in self._registry.sessions()}
        if session.identity not in here and (pool := self._pools.pop(session.identity, None)):
            pool.shutdown(wait=False)
        self._write_off(session)
        self.watch.forget(session)
        fields = {"session": session.name, "tenant": session.identity}
        log.info("session %s of %s closed", session.name, session.identity, extra=fields)

    def _write_off(self, session: Session, outcome: str = "ok") -> None:
        """The line that ends a session in the audit log."""
        figures = self.watch.of(session).figures()
        self.audit.record("close", session.identity, outcome, session.name, **figures)
