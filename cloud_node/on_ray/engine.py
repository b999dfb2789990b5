"""The engine whose spans run on Ray: which session is at which replica, and what happens when one dies.

Knows sessions, chains of stages and Ray's errors; knows no wire and no identities. Weights, kept activations and
decode caches are in the stages. A session stays with its replica while that lives, and goes to another after.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock, Semaphore, Thread
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from cloud_node.engine import ASKED, Answer, Asked, EngineCard, Load, Opening, Place
from cloud_node.on_ray.chain import Chain
from cloud_node.on_ray.cluster import Cluster
from cloud_node.on_ray.looking import SILENT_AFTER_S, Stages
from cloud_node.on_ray.parts import legs
from cloud_node.on_ray.passes import LostSessionError
from isthmus.attached import Values
from isthmus.errors import DrainingError, IsthmusError, NotKeptError
from isthmus.linears import Site
from isthmus.round_trips import Parked
from isthmus.rows import Rows

log = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""How long a request waits for a stage or a replica to come back, its weights loaded again."""

PASSES_PER_TENANT = 64
"""Under way at once; further ones wait here, and not in front of the others'."""

AGAIN_AFTER_S = 0.5
LOOK_EVERY_S = 2.0

Result = TypeVar("Result")


@dataclass
class _Session:
    opening: Opening
    attached: Any = None  # the call that keeps it at its replica, for as long as that runs
    chain: Chain | None = None
    moving: Lock = field(default_factory=Lock)


class RayEngine:
    """Runs spans in the stages of Serve's replicas; see `cloud_node.engine.Engine`."""

    def __init__(self, cluster: Cluster, card: EngineCard, held: Sequence[range], blocks: int) -> None:
        """Serve what the replicas of `cluster` hold.

        Args:
            cluster: where they run.
            card: what all stages serve together.
            held: the blocks of each stage.
            blocks: of the whole model.
        """
        self._cluster = cluster
        self._card = card
        self._held = list(held)
        self._blocks = blocks
        self._sessions: dict[str, _Session] = {}
        self._running = 1  # replicas, when Serve was last asked
        self._stages = Stages()
        self._looked = time.monotonic()
        self._places: defaultdict[str, Semaphore] = defaultdict(lambda: Semaphore(PASSES_PER_TENANT))
        Thread(target=self._look, name="load", daemon=True).start()

    def describe(self) -> EngineCard:
        """See `Engine`."""
        return self._card

    def open(self, session: str, opening: Opening) -> None:
        """See `Engine`; a replica is found at the first request."""
        self._sessions.setdefault(session, _Session(opening))

    def close(self, session: str) -> None:
        """See `Engine`; waits for nobody: a session that is being attached now is detached by whoever does it."""
        opened = self._sessions.pop(session, None)
        if opened is not None and opened.moving.acquire(blocking=False):
            try:
                _detach(opened)
            finally:
                opened.moving.release()

    def forward(
        self, session: str, microbatch: int, hidden_ND: torch.Tensor, rows: Rows, keep: bool, asked: Asked = ASKED
    ) -> Answer:
        """See `Engine`."""
        return self._carried_out(session, lambda chain: chain.forward(microbatch, hidden_ND, rows, keep, asked))

    def backward(
        self,
        session: str,
        microbatch: int,
        grad_KD: torch.Tensor,
        again: tuple[torch.Tensor, Rows] | None,
        asked: Asked = ASKED,
    ) -> Answer:
        """See `Engine`; where a stage has lost what it kept, the input must come again."""
        return self._carried_out(session, lambda chain: chain.backward(microbatch, grad_KD, again, asked))

    def decode(
        self,
        session: str,
        microbatch: int,
        hidden_ND: torch.Tensor,
        rows: Rows,
        place: Place,
        asked: Asked = ASKED,
    ) -> Answer:
        """See `Engine`."""
        return self._carried_out(session, lambda chain: chain.decode(microbatch, hidden_ND, rows, place, asked))

    def park(self, session: str, microbatch: int, adapters: Mapping[Site, Parked]) -> Answer:
        """See `Engine`."""
        return self._carried_out(session, lambda chain: chain.park(microbatch, adapters))

    def attach(self, session: str, microbatch: int, values: Mapping[Site, Values]) -> Answer:
        """See `Engine`."""
        return self._carried_out(session, lambda chain: chain.attach(microbatch, values))

    def gradients(self, session: str, values: int, parts: Sequence[int]) -> Answer:
        """See `Engine`."""
        return self._carried_out(session, lambda chain: chain.gradients(values, parts))

    def release(self, session: str, microbatches: Sequence[int], sequences: Sequence[str]) -> None:
        """See `Engine`."""
        opened = self._sessions.get(session)
        if opened is not None and opened.chain is not None:
            opened.chain.release(microbatches, sequences)

    def load(self) -> Load:
        """See `Engine`; as it was a moment ago, for asking takes time, but for the peak, which passes tell."""
        for opened in list(self._sessions.values()):
            if chain := opened.chain:
                for stage, peak in zip(chain.stages, chain.peaks, strict=True):
                    self._stages.peaked(stage, peak)
        known = time.monotonic() - self._looked < SILENT_AFTER_S
        return self._stages.load(self._running if known else 0)

    def stop(self) -> None:
        """See `Engine`; passes under way are refused."""
        self._cluster.stop()

    def _carried_out(self, session: str, run: Callable[[Chain], Result]) -> Result:
        """Run a pass, again if a process dies under it: it is a function of the request, which is still here."""
        until = time.monotonic() + PATIENCE_S
        opened = self._opened(session)
        with self._places[opened.opening.tenant]:
            while True:
                chain: Chain | None = None
                try:
                    chain = self._chain(session, opened)
                    return run(chain)
                except IsthmusError:
                    raise
                except Exception as error:
                    if self._cluster.stopping.is_set():  # whatever Ray raises without its processes
                        raise DrainingError("the node is stopping; send the request again when it is back") from None
                    if not isinstance(error, RayError | RayServeException):
                        raise
                    self._mend(session, opened, chain, _cause(error))
                if time.monotonic() > until:
                    raise DrainingError("the replica that computes this does not come back; send the request again")

    def _opened(self, session: str) -> _Session:
        try:
            return self._sessions[session]
        except KeyError:
            raise NotKeptError("the session was closed; open it again") from None

    def _mend(self, session: str, opened: _Session, chain: Chain | None, error: Exception) -> None:
        """Make ready to try again, or raise what trying again would not mend."""
        if isinstance(error, IsthmusError):
            raise type(error)(*error.args) from None
        if not isinstance(error, LostSessionError | RayError | RayServeException):
            raise error
        why = {"session": session, "tenant": opened.opening.tenant, "error": type(error).__name__}
        log.warning("session %s: a stage or replica is gone (%s); trying again", session, why["error"], extra=why)
        if chain is not None and isinstance(error, LostSessionError):
            with suppress(RayError):
                chain.open()
            if self._sessions.get(session) is not opened:
                chain.close()
        elif chain is not None and self._gone(chain):
            with opened.moving:
                if opened.chain is chain:
                    _detach(opened)
        else:
            time.sleep(AGAIN_AFTER_S)

    def _gone(self, chain: Chain) -> bool:
        """Whether a stage has ended for good, and with it the replica; one that only began anew has not."""
        for stage in chain.stages:
            try:
                ray.get(stage.pid.remote(), timeout=LOOK_EVERY_S)
            except ActorDiedError:
                return True
            except RayError:
                return False
        return False

    def _chain(self, session: str, opened: _Session) -> Chain:
        """The stages that a session is at; it is attached to a replica's if it is at none."""
        with opened.moving:
            if opened.chain is None:
                opened.attached, stages = self._cluster.attach(session)
                self._stages.know(stages)
                opened.chain = Chain(session, opened.opening, legs(opened.opening, self._held, self._blocks), stages)
                with suppress(RayError):  # the pass will tell
                    opened.chain.open()
            chain = opened.chain
        if self._sessions.get(session) is not opened:  # closed meanwhile, by one that did not wait for this
            with opened.moving:
                _detach(opened)
            raise NotKeptError("the session was closed; open it again")
        return chain

    def _look(self) -> None:
        """Ask the stages how busy they are, from time to time."""
        while not self._cluster.stopping.wait(LOOK_EVERY_S):
            try:
                self._running = self._cluster.replicas()
                if self._running:
                    self._stages.know(self._cluster.some_stages())
                self._stages.look()
                self._looked = time.monotonic()
            except Exception as error:  # noqa: BLE001 (whatever Ray raises, the next look may do)
                log.debug("the stages were not asked: %s", type(error).__name__)


def _cause(error: Exception) -> Exception:
    """What a stage raised; Ray wraps it."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error


def _detach(opened: _Session) -> None:
    if opened.chain is not None:
        opened.chain.close()
    if opened.attached is not None:
        opened.attached.cancel()
    opened.chain = opened.attached = None
