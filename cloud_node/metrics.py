"""A node's figures as Prometheus reads them.

Knows names, units and labels; counts nothing itself. Every label's values are settled beforehand, so that no peer can
make the number of series grow: no sessions, no tenants, no messages.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cloud_node.engine import EngineCard, Load
from cloud_node.policy.authority import Authority
from cloud_node.status import Status, sessions_by_kind, streams
from cloud_node.watch import BOUNDS_S, PASSES, Durations, Watch
from isthmus import PROTOCOL, __version__
from isthmus.ledger.memory import peak_bytes, resident_bytes

BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64)

STAGE_NAMES = {
    "duration": ("isthmus_request_duration_seconds", "From a request's being whole here to its answer's being ready"),
    "queue": ("isthmus_request_queue_seconds", "Of a request's time: its wait for the device"),
    "compute": ("isthmus_request_compute_seconds", "Of a request's time: forward and backward passes"),
}


class Metrics(Collector):
    """Exports one node, by a registry of its own."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """The figures now, in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names do not depend on what is collected, and collecting asks the engine."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        status, service, load = self._status, self._status.service, self._status.load()
        yield from _process(status)
        yield _gauge("isthmus_ready", "1 while requests would be answered", status.missing(load) is None)
        if service is not None:
            yield _about(service.describe())
            yield from _sessions(service.watch)
            yield from _traffic(service.watch)
            yield from _work(service.watch)
            yield from _policy(service.authority)
        if load is not None:
            yield from _engine(load)


def _process(status: Status) -> Iterator[Metric]:
    yield _gauge("isthmus_start_time_seconds", "When it was started, since 1970", status.started)
    yield _gauge("isthmus_resident_memory_bytes", "Of the process, now", resident_bytes() or math.nan)
    yield _gauge("isthmus_resident_memory_peak_bytes", "Of the process, at most", peak_bytes() or math.nan)
    if status.certificate_until is not None:
        until = status.certificate_until
        yield _gauge("isthmus_certificate_expiry_timestamp_seconds", "When its certificate expires, since 1970", until)


def _about(card: EngineCard) -> Metric:
    about = {"version": __version__, "protocol": str(PROTOCOL), "torch": torch.__version__}
    about |= {"engine": card.engine, "device": card.device, "dtype": card.dtype}
    return _by(GaugeMetricFamily, "isthmus_build_info", "What runs here", list(about), {tuple(about.values()): 1})


def _sessions(watch: Watch) -> Iterator[Metric]:
    kinds = {(kind,): count for kind, count in sessions_by_kind(watch).items()}
    yield _by(GaugeMetricFamily, "isthmus_sessions", "Sessions open, by what for", ["kind"], kinds)
    yield _gauge("isthmus_streams", "Streams open", streams(watch))


def _traffic(watch: Watch) -> Iterator[Metric]:
    yield _by(
        CounterMetricFamily,
        "isthmus_wire_bytes",
        "Messages as serialised, gRPC's 5-byte prefix included",
        ["call", "direction"],
        watch.bytes,
    )
    yield _by(
        CounterMetricFamily,
        "isthmus_calls",
        "Calls that are no session; fetch-emulator that was answered is an emulator's bundle sent",
        ["call", "outcome"],
        watch.calls,
    )
    errors = {(kind,): count for kind, count in watch.errors.items()}
    yield _by(CounterMetricFamily, "isthmus_errors", "Errors by their name in the catalogue", ["kind"], errors)


def _work(watch: Watch) -> Iterator[Metric]:
    yield _by(
        CounterMetricFamily,
        "isthmus_requests",
        "Requests of sessions by how they ended",
        ["pass", "outcome"],
        watch.requests,
    )
    flops = {(kind,): count for kind, count in watch.flops.items()}
    yield _by(CounterMetricFamily, "isthmus_flops", "Floating-point operations", ["pass"], flops)
    for stage, (name, meaning) in STAGE_NAMES.items():
        histogram = HistogramMetricFamily(name, meaning, labels=["pass"])
        for each in PASSES.values():
            durations = watch.durations[stage, each]
            histogram.add_metric([each], _buckets(durations), durations.total_s)
        yield histogram


def _policy(authority: Authority) -> Iterator[Metric]:
    refused = {(reason,): count for reason, count in authority.refused.items()}
    yield _by(CounterMetricFamily, "isthmus_policy_refusals", "What the policy refused, by why", ["reason"], refused)
    charged = CounterMetricFamily("isthmus_policy_charged_tokens", "Tokens charged to daily budgets")
    charged.add_metric([], authority.charged_tokens)
    yield charged


def _engine(load: Load) -> Iterator[Metric]:
    yield _gauge("isthmus_waiting_requests", "Requests that wait for the device", load.waiting)
    yield _gauge("isthmus_replicas", "Copies of the span that run", load.replicas)
    yield _gauge("isthmus_stages", "Processes of stages; 0 where this one holds the span", len(load.stages))
    yield _gauge("isthmus_stages_missing", "Stages that have not answered for 30 seconds", load.missing)
    restarts = CounterMetricFamily("isthmus_stage_restarts", "Stages whose process had to begin anew")
    restarts.add_metric([], load.restarts)
    yield restarts
    yield _gauge("isthmus_weight_bytes", "Of the span's weights", load.weight_bytes)
    yield _gauge("isthmus_activation_bytes", "Activations, decode caches and parked adapters held", load.held_bytes)
    yield _gauge("isthmus_activation_budget_bytes", "That activations may take", load.budget_bytes)
    yield _gauge("isthmus_tensor_peak_bytes", "Tensors held at once, weights included, at most", load.peak_bytes)
    histogram = HistogramMetricFamily("isthmus_batch_requests", "Requests that the device ran at once")
    at_most = [(bound, sum(n for size, n in load.batches.items() if size <= bound)) for bound in BATCH_BOUNDS]
    buckets = [(str(float(bound)), float(count)) for bound, count in at_most]
    total = sum(size * times for size, times in load.batches.items())
    histogram.add_metric([], [*buckets, ("+Inf", float(sum(load.batches.values())))], total)
    yield histogram


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=value)


def _by(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    meaning: str,
    labels: Sequence[str],
    values: Mapping[Any, float],
) -> Metric:
    metric = family(name, meaning, labels=labels)
    for each, value in values.items():
        metric.add_metric(each, value)
    return metric


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    return [(bound, float(count)) for bound, count in zip(bounds, durations.cumulative(), strict=True)]
