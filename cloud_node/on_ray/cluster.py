"""A Ray cluster, joined or started here, and the deployment that runs on it.

Knows Ray's processes and Serve's settings; knows no sessions and no tensors. Whoever may speak to a Ray cluster may
run code on it: one that is started here takes a token that nobody else has (see `cloud_node.engines`), and has no
dashboard page.
"""

import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cloud_node.on_ray.plan import StagePlan
from isthmus.errors import ModelError, UnreachableError
from isthmus.trust.address import split_address

if TYPE_CHECKING:
    from cloud_node.engine import EngineCard

log = logging.getLogger(__name__)

HEAD_LOST = 75
"""Exit code of a node whose Ray head is gone: try again (EX_TEMPFAIL of sysexits.h)."""

LOOK_EVERY_S = 3.0
HEAD_WITHIN_S = 12.0
STOP_WITHIN_S = 20.0
ANSWER_WITHIN_S = 10.0

MORE_AFTER_S = 10.0
FEWER_AFTER_S = 600.0
"""How long requests wait, or none does, before replicas come or go; those of a replica that goes are asked again."""


@dataclass(frozen=True)
class Copies:
    """What is deployed: the stages of a replica, what each needs of a machine, and how many replicas there may be."""

    plans: Sequence[StagePlan]
    resources: dict[str, float]
    least: int
    most: int


class Cluster:
    """The processes that replicas run in; `stopping` is set once they end, or their head is lost."""

    def __init__(self, address: str | None, copies: Copies, name: str) -> None:
        """Join the cluster at `address`, or start one on this machine, and run the replicas.

        Raises:
            UnreachableError: no cluster answers at `address`.
            ModelError: the replicas do not start.
        """
        import ray  # not before: the process that supervises needs this file's exit code, and no Ray
        from ray import serve

        from cloud_node.on_ray import actors

        self._ray, self._serve = ray, serve
        self._joined = address is not None
        self._name = "isthmus-" + hashlib.blake2b(f"{socket.gethostname()} {name}".encode(), digest_size=4).hexdigest()
        self._connect(address, copies)
        self._handle = self._deploy(actors.Replica, actors.by_waiting, copies)
        self.stopping = threading.Event()

    def describe(self) -> "list[EngineCard]":
        """What each stage of a replica serves."""
        cards: list[EngineCard] = self._ray.get(
            [stage.describe.remote() for stage in self._handle.stages.remote().result()]
        )
        return cards

    def attach(self, session: str) -> tuple[Any, list[Any]]:
        """Have Serve choose a replica for a session; waits until there is one.

        Returns:
            The call to cancel at the session's end, and the handles of the stages.

        Raises:
            ray.exceptions.RayError, ray.serve.exceptions.RayServeException: the replica ended meanwhile.
        """
        call = self._handle.options(stream=True).attach.remote(session)
        stages: list[Any] = next(iter(call))
        return call, stages

    def some_stages(self) -> list[Any]:
        """The handles of some replica's stages; another's when asked again.

        Raises:
            ray.exceptions.RayError, ray.serve.exceptions.RayServeException, TimeoutError: none answers.
        """
        stages: list[Any] = self._handle.stages.remote().result(timeout_s=LOOK_EVERY_S)
        return stages

    def replicas(self) -> int:
        """How many replicas are ready."""
        application = self._serve.status().applications.get(self._name)
        states = application.deployments["Replica"].replica_states if application is not None else {}
        return int(states.get("RUNNING", 0))

    def stop(self) -> None:
        """Take the replicas away, and the cluster if it was started here."""
        self.stopping.set()
        if self._joined:
            self._serve.delete(self._name)
        self._ray.shutdown()

    def watch(self, lost: Callable[[], None]) -> None:
        """Call `lost` once if the cluster's head stops answering: Ray would end this process without a word."""
        threading.Thread(target=self._watch, args=(lost,), name="head", daemon=True).start()

    def _connect(self, address: str | None, copies: Copies) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address is None:
            cpus = copies.most * (len(copies.plans) * copies.resources.get("CPU", 0.0) + 1)
            try:
                self._ray.init(address="local", include_dashboard=False, num_cpus=int(cpus), **quiet)
            except Exception as error:  # noqa: BLE001 (Ray raises just that where its processes are late)
                raise UnreachableError(f"Ray does not start here ({_first_line(error)}); try again") from None
            return
        _require_answer(address)
        try:
            self._ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            found = _first_line(error)
            raise UnreachableError(f"no Ray cluster at {address} ({found}); begin one: ray start --head") from None

    def _deploy(self, replica: Any, policy: Any, copies: Copies) -> Any:
        from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

        self._serve.start(proxy_location="Disabled")
        if self._name in self._serve.status().applications:
            self._serve.delete(self._name)  # of a front end that died: its sessions are nobody's
        scale: dict[str, Any] = {"num_replicas": copies.least}
        if copies.most > copies.least:
            chosen = AutoscalingPolicy(policy_function=policy)
            scaling = AutoscalingConfig(
                min_replicas=copies.least,
                initial_replicas=copies.least,
                max_replicas=copies.most,
                upscale_delay_s=MORE_AFTER_S,
                downscale_delay_s=FEWER_AFTER_S,
                policy=chosen,
            )
            scale = {"num_replicas": None, "autoscaling_config": scaling}
        deployed = replica.options(
            **scale,
            ray_actor_options={"num_cpus": 0},
            placement_group_bundles=[copies.resources] * len(copies.plans),
            graceful_shutdown_timeout_s=STOP_WITHIN_S,
        )
        began = time.monotonic()
        log.info("starting %d to %d replicas of %d stages", copies.least, copies.most, len(copies.plans))
        try:
            handle = self._serve.run(deployed.bind(copies.plans, copies.resources), name=self._name, route_prefix=None)
        except RuntimeError as error:
            raise ModelError(f"the replicas do not start: {' '.join(str(error).split())[:400]}") from None
        log.info("the replicas are ready after %.0f s", time.monotonic() - began)
        return handle

    def _watch(self, lost: Callable[[], None]) -> None:
        with ThreadPoolExecutor(1) as pool:
            while not self.stopping.wait(LOOK_EVERY_S):
                try:
                    pool.submit(self._ray.nodes).result(HEAD_WITHIN_S)
                except Exception as error:  # noqa: BLE001 (whatever it is, the head does not answer)
                    if not self.stopping.is_set():
                        self.stopping.set()
                        log.warning("Ray's head does not answer (%s)", type(error).__name__)
                        lost()


def _require_answer(address: str) -> None:
    """Refuse an address where nobody listens: Ray would ask there for minutes.

    Raises:
        UnreachableError: nobody does.
    """
    if ":" not in address:  # `auto`, which Ray looks up
        return
    try:
        with socket.create_connection(split_address(address.removeprefix("ray://")), ANSWER_WITHIN_S):
            return
    except OSError as error:
        reason = f"no Ray cluster at {address} ({error.strerror or error})"
        raise UnreachableError(f"{reason}; begin one: ray start --head") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
