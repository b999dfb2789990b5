"""What Ray runs: a process for each stage, and the deployment that holds a replica's stages together.

Knows Ray and where the rest is; imports no model code before a stage has a process of its own.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from cloud_node.on_ray.plan import StagePlan

if TYPE_CHECKING:  # a replica holds no tensors, and starts without the libraries for them
    from cloud_node.engine import EngineCard, Load, Opening
    from cloud_node.on_ray.passes import Asking, Carried, Outcome, Pass, Reply

PASSES_AT_ONCE = 256
"""Of a stage, those that wait for its device; as many more wait for the edge. A tenant has a part of them only."""

WAITING_PER_REPLICA = 4
"""Requests that wait for a device, in a replica that is busy but not too busy."""

WAITING = "waiting"


@ray.remote(max_restarts=-1, max_concurrency=PASSES_AT_ONCE, concurrency_groups={"aside": 4, "waiting": PASSES_AT_ONCE})
class StageProcess:
    """`cloud_node.on_ray.stage.Stage`, each method a call to another process; begins anew whenever it dies."""

    def __init__(self, plan: StagePlan) -> None:
        from cloud_node.on_ray.stage import Stage

        self._stage = Stage(plan)

    @ray.method(concurrency_group="aside")
    def describe(self) -> "EngineCard":
        """See `Stage`."""
        return self._stage.describe()

    @ray.method(concurrency_group="aside")
    def load(self) -> "Load":
        """See `Stage`."""
        return self._stage.load()

    @ray.method(concurrency_group="aside")
    def waiting(self) -> int:
        """Requests that wait for its device."""
        return self._stage.load().waiting

    @ray.method(concurrency_group="aside")
    def pid(self) -> int:
        """See `Stage`."""
        return self._stage.pid()

    @ray.method(concurrency_group="aside")
    def open(self, session: str, opening: "Opening") -> None:
        """See `Stage`."""
        self._stage.open(session, opening)

    @ray.method(concurrency_group="aside")
    def close(self, session: str) -> None:
        """See `Stage`."""
        self._stage.close(session)

    @ray.method(concurrency_group="aside")
    def release(self, session: str, microbatches: Sequence[int], sequences: Sequence[str]) -> None:
        """See `Stage`."""
        self._stage.release(session, microbatches, sequences)

    @ray.method(concurrency_group="aside")
    def answer(self, asker: str, reply: "Reply") -> None:
        """See `Stage`."""
        self._stage.answer(asker, reply)

    @ray.method(num_returns=2)
    def run(self, one: "Pass", *tensors: "Carried") -> "tuple[Carried, Outcome]":
        """See `Stage`."""
        return self._stage.run(one, *tensors)

    @ray.method(num_returns="streaming", concurrency_group="waiting")
    def run_asking(self, one: "Pass", *tensors: "Carried") -> "Iterator[Asking | Outcome | Carried]":
        """See `Stage`."""
        yield from self._stage.run_asking(one, *tensors)


@serve.deployment(name="Replica", max_ongoing_requests=1 << 16)
class Replica:
    """One copy of the span: its stages. A session stays attached to it, and passes go to the stages directly."""

    def __init__(self, plans: Sequence[StagePlan], resources: dict[str, float]) -> None:
        options = {"num_cpus": resources.get("CPU", 0.0), "num_gpus": resources.get("GPU", 0.0)}
        process: Any = StageProcess
        self._stages = [process.options(**options).remote(plan) for plan in plans]
        ray.get([stage.pid.remote() for stage in self._stages])  # what cannot be loaded is told here

    def stages(self) -> list[Any]:
        """The handles of its stages."""
        return self._stages

    async def attach(self, session: str) -> AsyncIterator[list[Any]]:
        """The stages, for one session; it counts as attached until it cancels this."""
        del session
        yield self._stages
        await asyncio.Event().wait()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Requests that wait for the busiest stage's device; Serve asks for it."""
        said = await asyncio.gather(*(stage.waiting.remote() for stage in self._stages), return_exceptions=True)
        return {WAITING: float(max((one for one in said if isinstance(one, int)), default=0))}


def by_waiting(context: Any) -> tuple[float, dict[str, Any]]:
    """How many replicas Serve should run: so many that `WAITING_PER_REPLICA` requests wait at each, at most."""
    waiting = context.aggregated_metrics.get(WAITING, {})
    return max(1.0, math.ceil(sum(waiting.values()) / WAITING_PER_REPLICA)), {}
