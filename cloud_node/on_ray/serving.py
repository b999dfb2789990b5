"""A node's engine on Ray, from its settings.

Knows the settings of `cloud_node serve`, and what a process does whose head is lost; computes nothing.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cloud_node.config import ServeConfig
from cloud_node.engine import EngineCard
from cloud_node.on_ray.cluster import HEAD_LOST, Cluster, Copies
from cloud_node.on_ray.engine import RayEngine
from cloud_node.on_ray.parts import part_of, shares
from cloud_node.on_ray.plan import StagePlan

log = logging.getLogger(__name__)


def build_engine(settings: ServeConfig, directory: Path, blocks: int) -> RayEngine:
    """Start or join a cluster, and have its replicas load the span.

    Raises:
        UsageError: there are more stages than blocks, or Ray is not installed.
        UnreachableError, ModelError: see `Cluster`.
    """
    held = shares(settings.cuts, blocks, settings.stages)
    plans = [_plan(settings, directory, share, blocks) for share in held]
    gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    resources = {"CPU": 1.0, "GPU": 1.0} if gpu else {"CPU": 1.0}
    cluster = Cluster(settings.address, Copies(plans, resources, *settings.least_and_most_replicas), settings.listen)
    cluster.watch(_head_lost)
    return RayEngine(cluster, _joint(cluster.describe(), settings), held, blocks)


def _plan(settings: ServeConfig, directory: Path, share: range, blocks: int) -> StagePlan:
    parts = {part_of(cut, share, blocks) for cut in settings.cuts}
    _, most = settings.least_and_most_replicas
    here = None if settings.address is not None else max(1, (os.cpu_count() or 1) // (settings.stages * most))
    return StagePlan(
        model=directory.resolve(),
        parts=tuple(sorted((part for part in parts if part is not None), key=str)),
        dtype=settings.dtype,
        device=settings.device,
        quantize=settings.quantize,
        activation_budget=settings.activation_budget // settings.stages,
        threads=settings.threads or here,
    )


def _joint(cards: Sequence[EngineCard], settings: ServeConfig) -> EngineCard:
    """What stages serve together: the cuts offered, and the linear modules of all of them."""
    linears = {site: linear for card in cards for site, linear in card.linears.items()}
    return replace(cards[0], cuts=tuple(settings.cuts), linears=linears, engine=settings.engine)


def _head_lost() -> None:
    """End this process, and with it what it started; whoever started it begins anew.

    At once: Ray's own shutdown may wait for the head that is gone, and lets nothing else in this process run meanwhile.
    """
    log.error("beginning anew without it; clients send again what they wait for")
    os._exit(HEAD_LOST)
