"""What a finished forward-only run says.

Knows run directories; trains nothing.
"""

import statistics
from itertools import pairwise
from pathlib import Path

from benchmarks.results import Figure
from benchmarks.scores import read_lines, scores
from isthmus.report.schema import RunReport

VALIDATION = "accuracy on the validation rows"
FIRST, LATER = "tensor bytes, epoch 1", "tensor bytes, later epochs"


def figures(run: Path, epoch_steps: int, validation: float) -> dict[str, Figure]:
    """What a run directory says; `epoch_steps` are an epoch, `validation` is its share of right validation rows."""
    return {
        **scores(run),
        VALIDATION: Figure(100 * validation, "%"),
        **_traffic(run / "ledger.jsonl", epoch_steps),
        **_spent(RunReport.load(run)),
        **_steps(run / "metrics.jsonl", epoch_steps),
    }


def _traffic(ledger: Path, epoch_steps: int) -> dict[str, Figure]:
    lines = [line for line in read_lines(ledger) if line["phase"] == "train"]
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
    ends = [0.0, *(line["seconds"] for line in read_lines(metrics))]
    seconds = [after - before for before, after in pairwise(ends)]
    cold, warm = seconds[:epoch_steps], seconds[epoch_steps:]
    parts = {"step, epoch 1": cold, "step, later epochs": warm}
    return {name: Figure(statistics.median(part), "s") for name, part in parts.items() if part}
