"""The engine whose spans run on Ray: which session is at which replica, and what happens when one dies.

Knows sessions, chains of stages and Ray's errors; knows no wire and no identities. Weights, kept activations and
decode caches are in the stages. A session stays with its replica while that lives, and goes to another after.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Event, Lock, Thread
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from cloud_node.engine import ASKED, Answer, Asked, EngineCard, Load, Opening, Place
from cloud_node.on_ray.chain import Chain
from cloud_node.on_ray.cluster import Cluster
from cloud_node.on_ray.parts import legs
from cloud_node.on_ray.passes import LostSessionError
from cloud_node.round_trips import Parked
from isthmus.errors import DrainingError, IsthmusError, NotKeptError
from isthmus.linears import Site
from isthmus.rows import Rows

log = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""How long a request waits for a stage or a replica to come back, its weights loaded again."""

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
        self._load = Load()
        self._stages: set[Any] = set()
        self._peak = 0
        self._stopped = Event()
        Thread(target=self._look, name="load", daemon=True).start()

    def describe(self) -> EngineCard:
        """See `Engine`."""
        return self._card

    def open(self, session: str, opening: Opening) -> None:
        """See `Engine`; a replica is found at the first request."""
        self._sessions.setdefault(session, _Session(opening))

    def close(self, session: str) -> None:
        """See `Engine`."""
        if opened := self._sessions.pop(session, None):
            _detach(opened)

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

    def release(self, session: str, microbatches: Sequence[int], sequences: Sequence[str]) -> None:
        """See `Engine`."""
        opened = self._sessions.get(session)
        if opened is not None and opened.chain is not None:
            opened.chain.release(microbatches, sequences)

    def load(self) -> Load:
        """See `Engine`; as it was a moment ago, for asking takes time, but for the peak, which passes tell."""
        chains = [opened.chain for opened in list(self._sessions.values()) if opened.chain is not None]
        replicas = {chain.stages[0]: sum(chain.peaks) for chain in chains}
        self._peak = max(self._peak, self._load.peak_bytes, sum(replicas.values()))
        return replace(self._load, peak_bytes=self._peak)

    def stop(self) -> None:
        """See `Engine`."""
        self._stopped.set()
        self._cluster.stop()

    def _carried_out(self, session: str, run: Callable[[Chain], Result]) -> Result:
        """Run a pass, again if a process dies under it: it is a function of the request, which is still here."""
        until = time.monotonic() + PATIENCE_S
        while True:
            opened = self._sessions.get(session)
            if opened is None:
                raise NotKeptError("the session was closed; open it again")
            chain = self._chain(session, opened)
            try:
                return run(chain)
            except RayError as error:
                self._mend(session, opened, chain, _cause(error))
            if time.monotonic() > until:
                raise DrainingError("the replica that computes this does not come back; send the request again")

    def _mend(self, session: str, opened: _Session, chain: Chain, error: Exception) -> None:
        """Make ready to try again, or raise what trying again would not mend."""
        if isinstance(error, IsthmusError):
            raise type(error)(*error.args) from None
        if not isinstance(error, LostSessionError | RayError):
            raise error
        log.info("session %s: %s; trying again", session, type(error).__name__)
        if isinstance(error, LostSessionError):
            with suppress(RayError):
                chain.open()
        elif self._gone(chain):
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
        with opened.moving:
            if opened.chain is None:
                opened.attached, stages = self._cluster.attach(session)
                self._stages |= set(stages)
                chain = Chain(session, opened.opening, legs(opened.opening, self._held, self._blocks), stages)
                with suppress(RayError):  # the pass will tell
                    chain.open()
                opened.chain = chain
            return opened.chain

    def _look(self) -> None:
        """Ask the stages that sessions were ever at how busy they are, from time to time."""
        while not self._stopped.wait(LOOK_EVERY_S):
            loads = []
            for stage in list(self._stages):
                try:
                    loads.append(ray.get(stage.load.remote(), timeout=LOOK_EVERY_S))
                except ActorDiedError:
                    self._stages.discard(stage)
                except RayError:
                    continue  # it begins anew
            with suppress(RayError):
                self._load = _summed(loads, self._cluster.replicas())


def _cause(error: RayError) -> Exception:
    """What a stage raised; Ray wraps it."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error


def _detach(opened: _Session) -> None:
    if opened.chain is not None:
        opened.chain.close()
    if opened.attached is not None:
        opened.attached.cancel()
    opened.chain = opened.attached = None


def _summed(loads: Sequence[Load], replicas: int) -> Load:
    batches: dict[int, int] = {}
    for load in loads:
        for size, times in load.batches.items():
            batches[size] = batches.get(size, 0) + times
    return Load(
        waiting=sum(load.waiting for load in loads),
        weight_bytes=sum(load.weight_bytes for load in loads),
        held_bytes=sum(load.held_bytes for load in loads),
        budget_bytes=sum(load.budget_bytes for load in loads),
        peak_bytes=sum(load.peak_bytes for load in loads),
        batches=batches,
        replicas=max(1, replicas),
    )
