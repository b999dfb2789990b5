"""What finished runs say: figures of one, and what several came to on the same held-out rows.

Knows run directories and intervals; trains nothing.
"""

import json
import statistics
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.results import Figure
from isthmus.report.interval import paired, ratio_interval, wilson
from isthmus.report.schema import RunReport

ACCURACY, LOSS = "accuracy", "loss"
VALIDATION = "accuracy on the validation rows"
FIRST, LATER = "tensor bytes, epoch 1", "tensor bytes, later epochs"


def figures(run: Path, epoch_steps: int, validation: float) -> dict[str, Figure]:
    """What a run directory says; `epoch_steps` are an epoch, `validation` is its share of right validation rows."""
    scores = _json(run / "scores.json")
    return {
        ACCURACY: _accuracy(scores["after"]),
        LOSS: _loss(scores["after"]),
        "accuracy before training": _accuracy(scores["before"]),
        "loss before training": _loss(scores["before"]),
        VALIDATION: Figure(100 * validation, "%"),
        **_traffic(run / "ledger.jsonl", epoch_steps),
        **_spent(RunReport.load(run)),
        **_steps(run / "metrics.jsonl", epoch_steps),
    }


def differences(run: Path, reference: Path) -> dict[str, Figure]:
    """How a run's scores after training differ from the reference's, with intervals paired by held-out row.

    Raises:
        ValueError: the two were not scored on the same number of rows.
    """
    mine, its = _json(run / "scores.json")["after"], _json(reference / "scores.json")["after"]
    change, low, high = paired(its["correct"], mine["correct"])
    nats = [new - old for new, old in zip(mine["nats"], its["nats"], strict=True)]
    loss, least, greatest = ratio_interval(nats, its["tokens"])
    return {
        ACCURACY: Figure(100 * change, "points", 100 * low, 100 * high),
        LOSS: Figure(loss, "nats per token", least, greatest),
    }


def _accuracy(scores: Mapping[str, Any]) -> Figure:
    right, rows = sum(scores["correct"]), len(scores["correct"])
    low, high = wilson(right, rows)
    return Figure(100 * right / rows, "%", 100 * low, 100 * high)


def _loss(scores: Mapping[str, Any]) -> Figure:
    loss, low, high = ratio_interval(scores["nats"], scores["tokens"])
    return Figure(loss, "nats per token", low, high)


def _traffic(ledger: Path, epoch_steps: int) -> dict[str, Figure]:
    lines = [line for line in _lines(ledger) if line["phase"] == "train"]
    sent = {False: 0, True: 0}
    for line in lines:
        sent[line["step"] > epoch_steps] += line.get("up_payload_bytes", 0) + line.get("down_payload_bytes", 0)
    return {FIRST: Figure(sent[False], ""), LATER: Figure(sent[True], "")}


def _spent(report: RunReport) -> dict[str, Figure]:
    edge, cloud = report.cost.edge, report.cost.cloud
    flops = {
        "edge, forward": edge.forward_flops,
        "edge, backward": edge.backward_flops,
        "cloud, forward": cloud.forward_flops,
        "cloud, backward": cloud.backward_flops,
    }
    memory = {"edge, process peak": edge.peak_memory_bytes, "edge, tensors' peak": edge.peak_tensor_bytes}
    return {
        **{name: Figure((count or 0) / 1e12, "TFLOP") for name, count in flops.items()},
        **{name: Figure((count or 0) / 1e6, "MB") for name, count in memory.items()},
    }


def _steps(metrics: Path, epoch_steps: int) -> dict[str, Figure]:
    """Median seconds a step: the first epoch's first steps warm up, which a median does not mind."""
    ends = [0.0, *(line["seconds"] for line in _lines(metrics))]
    seconds = [after - before for before, after in pairwise(ends)]
    cold, warm = seconds[:epoch_steps], seconds[epoch_steps:]
    parts = {"step, epoch 1": cold, "step, later epochs": warm}
    return {name: Figure(statistics.median(part), "s") for name, part in parts.items() if part}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
