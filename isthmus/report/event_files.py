"""Runs as TensorBoard's event files: loss, gradient norm, rate, accuracy and bytes, step by step.

Knows names of scalars and where each run's files go; the files' form is the tensorboard package's.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import UsageError
from isthmus.report import offsite
from isthmus.report.curves import scored
from isthmus.report.evaluated import Kept
from isthmus.report.fields.score import Score
from isthmus.report.history import History
from isthmus.report.schema import RunReport

_Scalar = tuple[str, float, int]
"""A name, a value, and the step."""


def export(
    out: Path, reports: Mapping[str, RunReport], histories: Mapping[str, History], kept: Mapping[str, Kept]
) -> None:
    """Write a folder for each named run into `out`.

    Args:
        out: made if need be.
        reports: by the runs' names.
        histories: what their directories tell step by step, by the same names.
        kept: what their directories have beside that, by the same names.

    Raises:
        UsageError: tensorboard is not installed, or a folder cannot be written or has files of an earlier export.
    """
    writer = _writer()
    plugged = {made.name: made.plugged_in.score for made in offsite.tables(reports, kept)}
    for name, run in reports.items():
        folder = out / folder_name(name)
        if any(folder.glob("events.out.*")):
            raise UsageError(f"{folder} has event files already; remove it, or choose another --out")
        began = run.started.timestamp() if run.started is not None else 0.0
        clock = {0: began} | {each.step: began + each.seconds for each in histories[name].metrics}
        try:
            events = writer(str(folder))
            for tag, value, step in _scalars(run, histories[name], plugged.get(name)):
                events.add_scalar(tag, value, step, walltime=clock.get(step, max(clock.values())))
            events.close()
        except OSError as error:
            raise UsageError(f"{folder} cannot be written ({error.strerror}); choose another --out") from None


def folder_name(run: str) -> str:
    """What a run's folder is called: its name without what has a meaning in paths."""
    return re.sub(r"[^\w.:+=-]+", "_", run).strip("._") or "run"


def _scalars(run: RunReport, history: History, plugged_in: Score | None) -> Iterator[_Scalar]:
    for each in history.metrics:
        yield "train/loss", each.loss, each.step
        yield "train/gradient_norm", each.gradient_norm, each.step
        yield "train/lr", each.lr, each.step
    for step, (up, down) in history.crossed.items():
        yield "wire/up_bytes", up, step
        yield "wire/down_bytes", down, step
    for mark in scored(run, history, plugged_in):
        where = "eval_on_the_emulator" if mark.emulated else "eval"
        if mark.loss is not None:
            yield f"{where}/loss", mark.loss, mark.step
        if mark.accuracy is not None:
            yield f"{where}/accuracy", mark.accuracy, mark.step


def _writer() -> Any:
    """PyTorch's writer, which is a thin one around tensorboard's.

    Raises:
        UsageError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--format tensorboard needs tensorboard; install it with: pip install 'isthmus[report]'"
        ) from None
    return SummaryWriter
