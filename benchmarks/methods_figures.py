"""What a row that compares methods came to.

Knows run directories and what was scored after the run; trains nothing.
"""

import json
from pathlib import Path

from benchmarks.results import Figure
from benchmarks.scores import ACCURACY, LOSS, differences, scores
from isthmus.report.evaluated import Line, read
from isthmus.report.schema import RunReport

UNTOUCHED, CHANGE, LESS_SPLIT = "untouched model", "change", "less `split`"
UP, DOWN, TRIPS = "kB up per 1,000 tokens", "kB down per 1,000 tokens", "round trips per step"
FETCHED, CROSSED, REACHED = "fetched before", "crossed in training", "bytes to reach it"
EDGE_FORWARD, EDGE_BACKWARD = "edge, forward", "edge, backward"
CLOUD_FORWARD, CLOUD_BACKWARD = "cloud, forward", "cloud, backward"
MEMORY, TRAINABLE, CHANGED, ADAPTER = "edge, tensors' peak", "trainable parameters", "changed parameters", "adapter"
TOKENS, STEPS, SPEED, OTHERS, MINUTES = "tokens", "steps", "tokens/s", "other work on the cores", "the row took"


def stage_of(stage: str, score: str) -> str:
    """The name of a figure: a score of the untouched model, or by how much another differs."""
    return f"{stage}, {score}"


def figures(run: Path, untouched: Path, split: Path, bundle_bytes: int | None) -> dict[str, Figure]:
    """What a row came to.

    Args:
        run: with `scores.json`.
        untouched: folder of the untouched model's scores on the same rows.
        split: folder of those of its domain's `split`, which may not be there.
        bundle_bytes: of the emulator and the ends that it was tuned on; None: what it needed was fetched by the run.
    """
    report = RunReport.load(run)
    own, base = scores(run), scores(untouched)
    found = {score: own[score] for score in (ACCURACY, LOSS)}
    found |= {stage_of(CHANGE, score): figure for score, figure in differences(run, untouched).items()}
    found |= {stage_of(UNTOUCHED, score): base[score] for score in (ACCURACY, LOSS)}
    if (split / "scores.json").is_file() and split != run:
        found[stage_of(LESS_SPLIT, ACCURACY)] = differences(run, split)[ACCURACY]
    return found | _crossed(report, bundle_bytes) | _computed(report)


def keep_scores(run: Path, folder: Path) -> None:
    """Lay the last evaluation of a run where `benchmarks.scores` looks for scores after training: into `folder`."""
    last: Line = read(run).evaluations[-1]
    folder.mkdir(parents=True, exist_ok=True)
    rows = last.per_row.model_dump(mode="json")
    content = {"schema": "isthmus-scores/1", "before": rows, "after": rows}
    (folder / "scores.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def _crossed(report: RunReport, bundle_bytes: int | None) -> dict[str, Figure]:
    wire, tokens = report.cost.wire, report.tokens.real
    crossed = wire.up_bytes + wire.down_bytes
    fetch = wire.by_phase.fetch
    fetched = fetch.up_bytes + fetch.down_bytes if bundle_bytes is None else bundle_bytes
    return {
        UP: Figure(wire.up_bytes / tokens, ""),
        DOWN: Figure(wire.down_bytes / tokens, ""),
        TRIPS: Figure(wire.round_trips / report.steps, ""),
        FETCHED: Figure(fetched / 1e6, "MB"),
        CROSSED: Figure(crossed / 1e6, "MB"),
        REACHED: Figure((fetched + crossed) / 1e6, "MB"),
    }


def _computed(report: RunReport) -> dict[str, Figure]:
    edge, cloud, params = report.cost.edge, report.cost.cloud, report.params
    flops = {
        EDGE_FORWARD: edge.forward_flops,
        EDGE_BACKWARD: edge.backward_flops,
        CLOUD_FORWARD: cloud.forward_flops,
        CLOUD_BACKWARD: cloud.backward_flops,
    }
    counts = {TRAINABLE: params.trainable, CHANGED: params.changed}
    return {
        **{name: Figure((count or 0) / 1e12, "TFLOP") for name, count in flops.items()},
        MEMORY: Figure((edge.peak_tensor_bytes or 0) / 1e6, "MB"),
        **{name: Figure(count, "") for name, count in counts.items() if count is not None},
        ADAPTER: Figure((params.stored_bytes or 0) / 1e6, "MB"),
        TOKENS: Figure(report.tokens.real, ""),
        STEPS: Figure(report.steps, ""),
        SPEED: Figure(report.throughput.train_tokens_per_s or 0, ""),
    }
