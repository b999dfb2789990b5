"""Runs on an emulator and beside it, their evaluations and the figures of each row, all with scores of one's choice."""

from typing import Any

from isthmus.report.evaluated import Kept, Line, PerRow
from isthmus.report.fields.cost import ByPhase, Traffic
from isthmus.report.fields.offsite import Offsite
from isthmus.report.fields.run import BegunFrom, Throughput
from isthmus.report.fields.score import Evaluation, Score
from isthmus.report.interval import wilson
from isthmus.report.offsite import Table, tables
from isthmus.report.schema import RunReport
from tests.report.example import costing, report

ADAPTER, HELD_OUT, OTHER = "ad" * 32, "da" * 32, "0e" * 32
ROWS, TOKENS = 1000, 2


def score(points: float | None, loss: float | None) -> Score:
    """So many points of accuracy on a thousand rows."""
    if points is None:
        return Score(loss=loss, accuracy=None)
    correct = round(points * ROWS / 100)
    return Score(loss=loss, accuracy=correct / ROWS, correct=correct, accuracy_interval=wilson(correct, ROWS))


ZERO, EMULATED, TUNED, PLUGGED, ON, FULL = (
    *(score(78, 0.48), score(62, 0.6), score(75.5, 0.42)),
    *(score(84, 0.36), score(86.8, 0.32), score(87.4, 0.31)),
)


def per_row(found: Score, others: int = 0, spread: float = 0.1) -> PerRow:
    """Figures that come to a score.

    The first rows are the right ones, so that a better score is right wherever a worse one was; `others` of them have
    changed places with rows further on. Every second row is `spread` nats per token above the loss, the others below.
    """
    assert found.loss is not None
    correct = [place < (found.correct or 0) for place in range(ROWS)]
    correct = [*correct[others:], *correct[:others]] if found.accuracy is not None else []
    nats = [TOKENS * (found.loss + (spread if place % 2 else -spread)) for place in range(ROWS)]
    return PerRow(nats=tuple(nats), tokens=(TOKENS,) * ROWS, correct=tuple(correct))


def scored(before: Score, after: Score, **changed: Any) -> RunReport:
    """A run on the true span throughout, scored on the rows of the others."""
    evaluation = Evaluation(rows=ROWS, before=before, after=after)
    return report(**({"eval": evaluation, "eval_data": HELD_OUT, "train": "both"} | changed))


def offsite(before: Score, after: Score, **changed: Any) -> RunReport:
    """A run on an emulator of a third of the span's FLOPs, with figures of its own for what it cost."""
    emulator = Offsite(
        emulator="e0" * 32,
        method="rank",
        blocks=26,
        bits=None,
        parameters=40_000_000,
        span_parameters=92_000_000,
        weight_bytes=160_000_000,
        flops_per_token=80_000_000,
        span_flops_per_token=240_000_000,
        distilled_steps=0,
        gap=0.257,
    )
    fields = {"method": "offsite", "offsite": emulator, "adapter": ADAPTER, "server": None, "steps": 100}
    return spending(scored(before, after, **(fields | changed)), down=160_000_000, flops=12 * 10**12, rate=250.0)


def carried_on(before: Score, after: Score, steps: int = 10, **changed: Any) -> RunReport:
    """A run on the true span that began with that one's adapter."""
    fields = {"begun_from": BegunFrom(method="offsite", adapter=ADAPTER), "steps": steps}
    return spending(scored(before, after, **(fields | changed)), down=7_000_000, flops=10**12, rate=50.0)


def spending(run: RunReport, down: int, flops: int, rate: float) -> RunReport:
    """The run with so many bytes fetched and no others, so many FLOPs of both passes, and 1,000 tokens trained on."""
    phases = dict.fromkeys(ByPhase.model_fields, Traffic(up_bytes=0, down_bytes=0))
    fetched = phases | {"fetch": Traffic(up_bytes=0, down_bytes=down)}
    spent = costing(
        run,
        wire={"by_phase": ByPhase(**fetched), "up_bytes": 0, "down_bytes": 0},
        edge={"forward_flops": flops // 4, "backward_flops": flops - flops // 4},
    )
    return spent.model_copy(
        update={
            "throughput": Throughput(train_tokens_per_s=rate, eval_tokens_per_s=None),
            "tokens": run.tokens.model_copy(update={"real": 1_000, "padded": 1_000}),
        }
    )


def alone(**changed: Any) -> dict[str, RunReport]:
    """The run on the emulator, with nothing to compare it with."""
    return {"off": offsite(EMULATED, TUNED, **changed)}


def everything() -> dict[str, RunReport]:
    """That run, one that went on from it, and one on the true span throughout: every row."""
    return {**alone(), "on": carried_on(PLUGGED, ON), "full": scored(ZERO, FULL, steps=100)}


def evaluated(found: Score, figures: PerRow | None = None, **changed: Any) -> Line:
    """An evaluation on the true span over the wire, of the adapter (unless untouched), on the rows of the runs."""
    fields: dict[str, Any] = {
        "span": "remote",
        "emulator": None,
        "untouched": False,
        "adapter": None if changed.get("untouched") else ADAPTER,
        "data": HELD_OUT,
        "rows": ROWS,
        "score": found,
        "up_bytes": 21_000_000,
        "down_bytes": 19_000_000,
        "tokens_per_s": 600.0,
        "per_row": figures or per_row(found),
    }
    return Line(**(fields | changed))


def kept(runs: dict[str, RunReport], *lines: Line, without: tuple[str, ...] = ()) -> dict[str, Kept]:
    """What is beside the reports: the evaluations of the first run, and figures of each row but of those `without`."""

    def rows(name: str, of: Score) -> PerRow | None:
        return per_row(of) if of.loss is not None and name not in without else None

    found = {
        name: Kept(f"runs/{name}", (), rows(name, run.eval.before), rows(name, run.eval.after))
        for name, run in runs.items()
    }
    first = next(iter(runs))
    return found | {first: Kept(f"runs/{first}", lines, found[first].before, found[first].after)}


def table(runs: dict[str, RunReport], *lines: Line, without: tuple[str, ...] = ()) -> Table:
    """The only table of these runs."""
    (found,) = tables(runs, kept(runs, *lines, without=without))
    return found
