"""`python -m benchmarks.seconds`: seconds of a step as planned, against runs on links and batches not calibrated on.

Knows processes, cores and what a run left behind; the cases stand in `benchmarks.seconds_cases`. The edge has the
first core and the server the last, so that neither computes on the other's.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import PreTrainedConfig

from benchmarks.place import Place
from benchmarks.scores import read_json, read_lines
from benchmarks.seconds_cases import AS_IT_IS, CASES, CUTS, SPARED, STEPS, TIMED, Case, save_model, write_data
from benchmarks.series import start
from edge_client.alive import PartOfStep
from edge_client.planned import Planned
from edge_client.runs import RunDirectory
from isthmus.cut import Cut
from isthmus.load import load_config, load_tokenizer
from isthmus.planning.calibration import Calibration, read
from isthmus.planning.figures import Crossing, Leg, SideFlops, Step
from isthmus.planning.fitting import undisturbed
from isthmus.planning.links import Link
from isthmus.planning.machines import Machine
from isthmus.planning.passes import passes_of
from isthmus.planning.seconds import StepSeconds, step_seconds
from isthmus.planning.workload import Workload
from isthmus.ports import every
from isthmus.training.data import Example, read_examples

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
    with _on({max(os.sched_getaffinity(0))}):
        server = place.process("cloud_node", "serve", "--model", place.model, *flags, *where)
        address = server.__enter__()
    try:
        yield address
    finally:
        server.__exit__(None, None, None)


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
    where: list[object] = ["--model", place.model, "--cut", case.cut]
    if case.method != "local":
        where = ["--server", address, "--certs", place.edge_certs, "--cut", case.cut]
        where += ["--link", case.link] if case.link != AS_IT_IS else []
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
        planned = _planned(case, place, calibration, spent[steps], run, data, known=epoch > 0)
        name = case.name if case.epochs == 1 else f"{case.name}, epoch {epoch + 1}"
        parts = [_computed(spent[steps], side) for side in ("edge", "cloud")]
        rows.append(Row(name, case.link, case.threads, planned, undisturbed(clock[steps]), *parts))
    return rows


def _computed(spent: Sequence[Mapping[str, Any]], side: str) -> float:
    return undisturbed([line.get(f"{side}_forward_s", 0) + line.get(f"{side}_backward_s", 0) for line in spent])


def _planned(
    case: Case,
    place: Place,
    calibration: Calibration,
    spent: Sequence[Mapping[str, Any]],
    run: Path,
    data: Path,
    known: bool,
) -> StepSeconds:
    """Seconds from what crossed and was computed, which plans tell within 1 %: this is about seconds alone."""
    edge, cloud = calibration.edge_at(case.threads), calibration.cloud
    link = Link.parse(case.link) if case.link != AS_IT_IS else calibration.link
    if edge is None or link is None:
        raise RuntimeError("the calibration lacks the device or the line")
    rows = read_examples(data, load_tokenizer(place.model), case.tokens).examples[: case.rows]
    outputs = sum(sum(row.train.counted[1:]) for row in rows)
    config, cut = load_config(place.model), Cut.parse(case.cut)
    passes = passes_of(
        config,
        cut,
        outputs,
        read_json(run / "run.json")["params"]["trainable"],
        _tensors(run / "adapter"),
        forward_only=case.forward_only,
        known=known and case.forward_only,
        beside=len(every(case.tap_every, cut, config.num_hidden_layers, 1)) if case.tap_every else 0,
        whole=case.method == "local",
        legs=_legs(run, config, rows, spent),
        calls=2 if case.method == "side" else 1,
    )
    nobody = Machine.by_hand(1e12)
    return step_seconds(_step(spent), link, edge, cloud or nobody, case.microbatches, passes, calibration.handling)


def _legs(
    run: Path, config: PreTrainedConfig, rows: Sequence[Example], spent: Sequence[Mapping[str, Any]]
) -> tuple[Leg, ...]:
    """As planned, with the ports that the run kept."""
    settings = RunDirectory(run).config()
    if settings.server is None:
        return ()
    places = [place.partition(".") for line in spent for place in line.get("places", {})]
    active = frozenset((int(block), name) for block, _, name in places if name)
    each = [(len(row.train.ids) - 1, sum(row.train.counted[1:])) for row in rows]
    lengths, losses = zip(*each, strict=True)
    return Planned(settings, config).legs(Workload(lengths, losses), PartOfStep(active))


def _tensors(adapter: Path) -> int:
    """How many parameters a run saved."""
    with safe_open(next(adapter.glob("*.safetensors")), framework="pt") as file:
        return len(file.keys())


def _step(spent: Sequence[Mapping[str, Any]]) -> Step:
    """The mean of what steps cost, as their ledger has it."""

    def mean(name: str) -> float:
        return sum(line.get(name, 0) for line in spent) / len(spent)

    crossing = Crossing(mean("up_bytes"), mean("down_bytes"), mean("round_trips"))
    edge, cloud = (
        SideFlops(mean(f"{side}_forward_flops"), mean(f"{side}_backward_flops")) for side in ("edge", "cloud")
    )
    return Step(crossing, edge, cloud)


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
