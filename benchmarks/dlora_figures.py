"""What a finished run says that may have had ports in the span.

Knows run directories; trains nothing.
"""

import statistics
from itertools import pairwise
from pathlib import Path

from benchmarks.results import Figure
from benchmarks.scores import read_lines, scores
from isthmus.report.schema import RunReport

BYTES, TRIPS = "bytes per real token", "round trips per step"
EDGE, PORTS, CLOUD = "edge", "adapters at ports", "cloud"
MEMORY = "edge, tensors' peak"
STEP, SLOW = "step, loopback", "step, 50 ms 100/100 Mbit/s"


def figures(run: Path) -> dict[str, Figure]:
    """What a run directory says of the whole of training: bytes and FLOPs are of all its steps."""
    report = RunReport.load(run)
    return {**scores(run), **_crossed(report), **_spent(report), STEP: Figure(_median_step(run), "s")}


def slow_step(run: Path) -> dict[str, Figure]:
    """Seconds a step of a run on a slow line."""
    return {SLOW: Figure(_median_step(run), "s")}


def worth_of_last(run: Path) -> dict[str, float] | None:
    """Importances that pick what Kill-and-Revive last kept alive; None where nothing was picked."""
    ports = RunReport.load(run).ports
    if ports is None or ports.kill_revive is None:
        return None
    alive = ports.kill_revive.decisions[-1].alive
    return {port.name: float(index in alive) for index, port in enumerate(ports.ports)}


def _crossed(report: RunReport) -> dict[str, Figure]:
    wire = report.cost.wire
    return {
        BYTES: Figure((wire.up_bytes + wire.down_bytes) / report.tokens.real, ""),
        TRIPS: Figure(wire.round_trips / report.steps, ""),
    }


def _spent(report: RunReport) -> dict[str, Figure]:
    edge, cloud = report.cost.edge, report.cost.cloud
    flops = {
        EDGE: (edge.forward_flops or 0) + (edge.backward_flops or 0),
        CLOUD: (cloud.forward_flops or 0) + (cloud.backward_flops or 0),
    }
    if report.ports is not None:
        flops[PORTS] = sum(port.edge_forward_flops + port.edge_backward_flops for port in report.ports.ports)
    return {
        **{name: Figure(count / 1e12, "TFLOP") for name, count in flops.items()},
        MEMORY: Figure((edge.peak_tensor_bytes or 0) / 1e6, "MB"),
    }


def _median_step(run: Path) -> float:
    """Seconds; the median minds neither the first steps nor, in most rows, those with all ports."""
    ends: list[float] = [0.0, *(line["seconds"] for line in read_lines(run / "metrics.jsonl"))]
    return statistics.median(after - before for before, after in pairwise(ends))
