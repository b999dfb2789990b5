"""Accuracy and loss of finished runs, and how they differ on the same held-out rows.

Knows run directories and intervals; trains nothing.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.results import Figure
from isthmus.report.interval import paired, ratio_interval, wilson

ACCURACY, LOSS = "accuracy", "loss"
BEFORE = "before training"


def scores(run: Path) -> dict[str, Figure]:
    """Of a run directory, after training and before."""
    found = read_json(run / "scores.json")
    after, before = found["after"], found["before"]
    return {
        ACCURACY: _accuracy(after),
        LOSS: _loss(after),
        f"{ACCURACY} {BEFORE}": _accuracy(before),
        f"{LOSS} {BEFORE}": _loss(before),
    }


def change_of(name: str, score: str) -> str:
    """The name of a figure of a comparison: how row `name` differs in `score`."""
    return f"{name}: {score}"


def changes_of(name: str, changes: Mapping[str, Figure]) -> dict[str, Figure]:
    """How row `name` differs, by the names of those figures."""
    return {change_of(name, score): figure for score, figure in changes.items()}


def differences(run: Path, reference: Path) -> dict[str, Figure]:
    """How a run's scores after training differ from the reference's, with intervals paired by held-out row.

    Raises:
        ValueError: the two were not scored on the same number of rows.
    """
    mine, its = _after(run), _after(reference)
    change, low, high = paired(its["correct"], mine["correct"])
    return {
        ACCURACY: Figure(100 * change, "points", 100 * low, 100 * high),
        LOSS: _loss_change([mine], [its]),
    }


def mean_differences(runs: Sequence[Path], references: Sequence[Path]) -> dict[str, Figure]:
    """How several runs differ from as many references on average, with intervals paired by held-out row.

    A row's difference is the mean over the pairs, so that a row counts once: its scores in different runs are not
    independent. The intervals are of these very runs on other rows, not of other runs.

    Raises:
        ValueError: they were not scored on the same number of rows.
    """
    mine, its = [_after(run) for run in runs], [_after(reference) for reference in references]
    right = [[float(correct) for correct in each["correct"]] for each in (*mine, *its)]
    change, low, high = ratio_interval(_by_row(right[: len(mine)], right[len(mine) :]), [1.0] * len(right[0]))
    return {ACCURACY: Figure(100 * change, "points", 100 * low, 100 * high), LOSS: _loss_change(mine, its)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> Any:
    """A file of JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def _after(run: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = read_json(run / "scores.json")["after"]
    return found


def _accuracy(found: Mapping[str, Any]) -> Figure:
    right, rows = sum(found["correct"]), len(found["correct"])
    low, high = wilson(right, rows)
    return Figure(100 * right / rows, "%", 100 * low, 100 * high)


def _loss(found: Mapping[str, Any]) -> Figure:
    loss, low, high = ratio_interval(found["nats"], found["tokens"])
    return Figure(loss, "nats per token", low, high)


def _loss_change(mine: Sequence[Mapping[str, Any]], its: Sequence[Mapping[str, Any]]) -> Figure:
    nats = _by_row([each["nats"] for each in mine], [each["nats"] for each in its])
    loss, low, high = ratio_interval(nats, its[0]["tokens"])
    return Figure(loss, "nats per token", low, high)


def _by_row(mine: Sequence[Sequence[float]], its: Sequence[Sequence[float]]) -> list[float]:
    """Each row's mean difference over the pairs."""
    pairs = [[new - old for new, old in zip(one, other, strict=True)] for one, other in zip(mine, its, strict=True)]
    return [fmean(row) for row in zip(*pairs, strict=True)]
