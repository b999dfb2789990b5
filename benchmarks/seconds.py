"""`python -m benchmarks.seconds`: seconds of a step as planned, against runs on links and batches not calibrated on.

Knows processes, cores and what a run left behind; the cases stand in `benchmarks.seconds_cases`. The edge has the
first core and the server the last, so that neither computes on the other's.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.place import Place
from benchmarks.scores import read_lines
from benchmarks.seconds_cases import (
    AS_IT_IS,
    CASES,
    CUTS,
    KEPT_BLOCKS,
    SPARED,
    STEPS,
    TIMED,
    Case,
    save_model,
    write_data,
)
from benchmarks.seconds_plan import emulator_of, planned_seconds
from benchmarks.series import start
from isthmus.planning.calibration import Calibration, read
from isthmus.planning.fitting import undisturbed
from isthmus.planning.seconds import StepSeconds

MOST_OFF = 0.2
WIDTH = 180


@dataclass(frozen=True)
class Row:
    """One case, or one epoch of it: seconds of a step as planned and as measured."""

    name: str
    link: str
    threads: int
    planned: StepSeconds
    measured: float
    measured_edge: float
    measured_cloud: float

    @property
    def off(self) -> float:
        """Planned over measured, less one."""
        return self.planned.total / self.measured - 1


def run(
    only: Annotated[list[str] | None, typer.Option(help="name of a case; may be repeated")] = None,
    smollm2: Annotated[Path | None, typer.Option(help="directory of SmolLM2-135M, to take it instead")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="threads to calibrate with; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="file for the rows, as JSON Lines")] = None,
) -> None:
    """Calibrate with one thread and the line as it is; then plan each case, run it, and show both."""
    unknown = set(only or ()) - {case.name for case in CASES}
    if unknown:
        raise typer.BadParameter(f"no case is called {', '.join(sorted(unknown))}")
    console, rows = Console(width=WIDTH, emoji=False), []
    with TemporaryDirectory(prefix="isthmus-seconds-") as scratch:
        model = smollm2 or save_model(Path(scratch) / "model")
        place = Place(Path(scratch), model, 1, TIMED)
        with _serving(place) as address:
            calibration = _calibrate(place, address, threads or [1])
            console.print_json(calibration.to_json())
            for case in [case for case in CASES if not only or case.name in only]:
                rows += _rows(case, place, address, calibration)
                console.print(_table(rows[-1:]))
    console.print(_table(rows))
    if out is not None:
        out.write_text("".join(json.dumps(asdict(row) | {"off": row.off}) + "\n" for row in rows))


@contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Processes that begin in here stay on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cores(case_threads: int = 1) -> set[int]:
    return set(sorted(os.sched_getaffinity(0))[:case_threads])


@contextmanager
def _serving(place: Place) -> Iterator[str]:
    """A server on the last core, with one thread."""
    flags: list[object] = [flag for cut in CUTS for flag in ("--cut", cut)]
    where = ["--listen", "127.0.0.1:0", "--certs", place.server_certs, "--threads", 1]
    with ExitStack() as open_here:
        with _on({max(os.sched_getaffinity(0))}):
            address = open_here.enter_context(
                place.process("cloud_node", "serve", "--model", place.model, *flags, *where)
            )
        yield address


def _calibrate(place: Place, address: str, threads: Sequence[int]) -> Calibration:
    """The device at each number of threads, and the line at the first."""
    found = []
    for number, count in enumerate(threads):
        file = place.directory / f"calibration-{count}.json"
        line = ["--server", address, "--certs", place.edge_certs, "--cut", CUTS[0]] if number == 0 else []
        with _on(_cores(count)):
            place.run("edge_client", "calibrate", "--model", place.model, *line, "--threads", count, "--out", file)
        found.append(read(file))
    speeds = {count: speed for one in found for count, speed in one.speeds.items()}
    return found[0].model_copy(update={"speeds": speeds})


def _rows(case: Case, place: Place, address: str, calibration: Calibration) -> list[Row]:
    run, data = place.directory / case.name, write_data(place.directory / f"{case.name}.jsonl", case)
    where = _where(case, place, address, data)
    amount = ["--max-length", case.tokens, "--batch-size", case.rows, "--microbatches", case.microbatches]
    amount += ["--epochs", case.epochs, "--threads", case.threads]
    amount += ["--cache", run / "cache"] if case.forward_only else []
    with _on(_cores(case.threads)):
        place.run(
            "edge_client", "train", "--method", case.method, *case.flags, *where, *amount, "--data", data, "--out", run
        )
    ends = [0.0, *(line["seconds"] for line in read_lines(run / "metrics.jsonl"))]
    clock = [after - before for before, after in pairwise(ends)]
    spent = [line for line in read_lines(run / "ledger.jsonl") if line["phase"] == "train"]
    rows = []
    for epoch in range(case.epochs):
        steps = slice(epoch * STEPS + SPARED, (epoch + 1) * STEPS)
        planned = planned_seconds(case, place, calibration, spent[steps], run, data, known=epoch > 0)
        name = case.name if case.epochs == 1 else f"{case.name}, epoch {epoch + 1}"
        parts = [_computed(spent[steps], side) for side in ("edge", "cloud")]
        rows.append(Row(name, case.link, case.threads, planned, undisturbed(clock[steps]), *parts))
    return rows


def _where(case: Case, place: Place, address: str, text: Path) -> list[object]:
    """Where the span is, or what stands in its place: an emulator, which is built."""
    if case.method == "local":
        return ["--model", place.model, "--cut", case.cut]
    if case.method == "offsite":
        made = ["--model", place.model, "--cut", case.cut, "--method", "drop", "--keep", KEPT_BLOCKS, "--text", text]
        place.run("cloud_node", "emulator", "build", *made, "--certs", place.server_certs, "--out", emulator_of(place))
        return ["--emulator", emulator_of(place), "--certs", place.edge_certs]
    line = ["--link", case.link] if case.link != AS_IT_IS else []
    return ["--server", address, "--certs", place.edge_certs, "--cut", case.cut, *line]


def _computed(spent: Sequence[Mapping[str, Any]], side: str) -> float:
    return undisturbed([line.get(f"{side}_forward_s", 0) + line.get(f"{side}_backward_s", 0) for line in spent])


def _table(rows: Sequence[Row]) -> Table:
    heading = (
        "case",
        "link",
        "threads",
        "edge",
        "cloud",
        "wire",
        "latency",
        "handling",
        "hidden",
        "planned",
        "measured",
    )
    table = Table(*heading, "off", title="seconds of a step; of edge and cloud: planned, measured")
    for row in rows:
        plan = row.planned
        edge, cloud = f"{plan.edge:.3f}, {row.measured_edge:.3f}", f"{plan.cloud:.3f}, {row.measured_cloud:.3f}"
        parts = [
            f"{part:.3f}" for part in (plan.wire, plan.latency, plan.handling, plan.hidden, plan.total, row.measured)
        ]
        verdict = f"{row.off:+.0%}" + ("" if abs(row.off) <= MOST_OFF else " missed")
        table.add_row(row.name, row.link, f"{row.threads}", edge, cloud, *parts, verdict)
    return table


if __name__ == "__main__":
    start(run)
