"""How busy the stages are, as each tells when it is asked, and which of them do not answer.

Knows stages' handles, their processes and loads; knows no sessions and moves no tensors.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from cloud_node.engine import Load

WITHIN_S = 2.0
"""All stages are asked at once, and answer in this time or at the next look."""

SILENT_AFTER_S = 30.0
"""A stage that has not answered for so long is missing: it loads its weights again, or cannot."""


@dataclass
class _Heard:
    """Of a stage: the first of its replica, its place there, when it answered last, and what it said."""

    first: Any
    place: int
    at: float
    process: int | None = None
    load: Load = field(default_factory=Load)
    peak_bytes: int = 0


class Stages:
    """What is known of every stage. One thread looks, any may tell or ask."""

    def __init__(self) -> None:
        """Know none."""
        self._heard: dict[Any, _Heard] = {}
        self._past: Counter[int] = Counter()  # batches of processes that have ended
        self._restarts = 0

    def know(self, stages: Sequence[Any]) -> None:
        """Ask these too from now on: those of one replica, in their order."""
        for place, stage in enumerate(stages):
            self._heard.setdefault(stage, _Heard(stages[0], place, time.monotonic()))

    def peaked(self, stage: Any, peak_bytes: int) -> None:
        """A pass tells how many bytes of tensors a stage has held at most."""
        if heard := self._heard.get(stage):
            heard.peak_bytes = max(heard.peak_bytes, peak_bytes)

    def look(self) -> None:
        """Ask all of them; those that ended with their replica are forgotten."""
        asked = {stage: (stage.pid.remote(), stage.load.remote()) for stage in list(self._heard)}
        references = [one for both in asked.values() for one in both]
        if references:
            ray.wait(references, num_returns=len(references), timeout=WITHIN_S)
        for stage, both in asked.items():
            try:
                process, load = ray.get(list(both), timeout=0)
                self._hear(self._heard[stage], process, load)
            except ActorDiedError:
                self._past.update(self._heard.pop(stage).load.batches)
            except RayError:
                continue  # it begins anew, or has much to do

    def load(self, running: int) -> Load:
        """What all are busy with, where so many replicas run; what ended processes have counted stays counted."""
        all_heard, now = list(self._heard.values()), time.monotonic()
        silent = [heard for heard in all_heard if now - heard.at > SILENT_AFTER_S]
        told = [heard for heard in all_heard if heard not in silent and heard.process is not None]
        batches = Counter(self._past)
        for heard in all_heard:
            batches.update(heard.load.batches)
        return Load(
            waiting=sum(heard.load.waiting for heard in told),
            weight_bytes=sum(heard.load.weight_bytes for heard in told),
            held_bytes=sum(heard.load.held_bytes for heard in told),
            budget_bytes=sum(heard.load.budget_bytes for heard in told),
            peak_bytes=sum(heard.peak_bytes for heard in all_heard),
            batches=dict(batches),
            replicas=max(0, running - len({heard.first for heard in silent})),
            restarts=self._restarts,
            missing=len(silent),
            stages=tuple(sorted(((heard.place, heard.load) for heard in told), key=itemgetter(0))),
        )

    def _hear(self, heard: _Heard, process: int, load: Load) -> None:
        if heard.process not in (None, process):
            self._restarts += 1
            self._past.update(heard.load.batches)
        heard.process, heard.load, heard.at = process, load, time.monotonic()
        heard.peak_bytes = max(heard.peak_bytes, load.peak_bytes)
