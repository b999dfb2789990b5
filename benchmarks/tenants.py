"""`python -m benchmarks.tenants`: many tenants on one engine, with and without joining, and a greedy one among them.

Knows which loads are compared; how tenants ask stands in `tenants_load`, the span of a large shape in `tenants_shape`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.place import CUT, Place
from benchmarks.results import Figure, Outcome, Row, Target, commit
from benchmarks.series import Again, Asked, Model, Only, Repeats, Series, Threads, show, show_targets, start
from benchmarks.tenants_load import Served, Tenant, serve, serve_beside
from benchmarks.tenants_shape import SHAPES, Shape, measure
from cloud_node.batching import ROWS
from cloud_node.in_process import InProcessEngine
from cloud_node.loading import load_spans
from isthmus.cut import Cut
from isthmus.load import load_config
from isthmus.rows import Rows

TENANTS = (1, 4, 16, 64)
REQUESTS = 256
"""Of all tenants together in one measurement, after one each that is not counted."""

SMALL, LARGE = Rows((32,), (0,)), Rows((256,) * 4, (0,) * 4)
MODEST, GREEDY = 15, 32
"""Tenants beside a greedy one, and the requests that it keeps waiting."""

FAIR, FIRST_COME, WITHOUT = "fair turns", "first come, first served", "without the greedy one"

PREFIX = "tenants/"
METHOD = (
    "The span of SmolLM2-135M at cut 2:2 in float32, in one process, no wire. Each tenant sends its next request as "
    "soon as its last is answered, {what}. Joining: up to 64 rows of those that wait are computed together; alone: one "
    "request at a time."
)
AMONG = (
    "Fifteen tenants that send a row of 32 tokens at a time, and one that always keeps 32 requests of 4 rows of 256 "
    "tokens waiting: the latency of the fifteen. First come, first served is the same engine with all as one tenant."
)
SECTIONS = (
    ("Many tenants, small batches", METHOD.format(what="a row of 32 tokens"), PREFIX + "forward"),
    ("Many tenants, decoding", METHOD.format(what="one token after a past that grows from 32"), PREFIX + "decode"),
    ("A greedy tenant among sixteen", AMONG, PREFIX + "greedy"),
)
"""Title, method and name of each, for the page."""


def many(place: Place, decodes: bool) -> Outcome:
    """So many tenants at once, with and without joining, in turns."""
    engines = {"joining": _engine(place, ROWS), "alone": _engine(place, 1)}
    found: dict[tuple[int, str], list[Served]] = {(count, kind): [] for count in TENANTS for kind in engines}
    for _ in range(place.repeats):
        for count, kind in found:
            tenants = [Tenant(engines[kind], f"tenant {number}", SMALL, decodes) for number in range(count)]
            found[count, kind].append(serve(tenants, math.ceil(REQUESTS / count)))
    figures: dict[str, Figure] = {}
    for (count, kind), served in found.items():
        figures |= _figures(f"{count} tenant{'s' * (count > 1)}, {kind}", served)
    pairs = zip(found[TENANTS[-1], "joining"], found[TENANTS[-1], "alone"], strict=True)
    gain = Figure.of([joined.tokens_per_s / apart.tokens_per_s for joined, apart in pairs], "times")
    figures[f"{TENANTS[-1]} tenants, joining against alone"] = gain
    return Outcome(figures, (Target("joining serves more tokens a second", str(gain), gain.value > 1),))


def greedy(place: Place) -> Outcome:
    """Fifteen modest tenants beside a greedy one, by fair turns and first come first served, and without it."""
    found: dict[str, list[Served]] = {FAIR: [], FIRST_COME: [], WITHOUT: []}
    engine = _engine(place, ROWS)
    for _ in range(place.repeats):
        for kind, served in found.items():
            owner = {FAIR: None, FIRST_COME: "everyone", WITHOUT: None}[kind]
            many_asks = [
                Tenant(engine, f"greedy {number}", LARGE, False, owner or "greedy")
                for number in range(GREEDY if kind != WITHOUT else 0)
            ]
            modest = [Tenant(engine, f"modest {number}", SMALL, False, owner) for number in range(MODEST)]
            served.append(serve_beside(many_asks, modest, max(2, REQUESTS // 64)))
    figures: dict[str, Figure] = {}
    for kind, served in found.items():
        figures |= _figures(kind, served)
    medians = {kind: Figure.of([one.percentile_ms(50) for one in served], "ms") for kind, served in found.items()}
    met = 5 * medians[FAIR].value < medians[FIRST_COME].value
    reached = f"{medians[FAIR]} against {medians[FIRST_COME]}"
    return Outcome(figures, (Target("a fifth of the latency of first come, first served, or less", reached, met),))


def _engine(place: Place, joined_rows: int) -> InProcessEngine:
    torch.set_num_threads(place.threads)
    spans = load_spans(place.model, [Cut.parse(CUT)], torch.float32, torch.device("cpu"))
    width = load_config(place.model).get_text_config().hidden_size
    return InProcessEngine(spans, "cpu", width, 1 << 30, joined_rows)


def _figures(name: str, served: Sequence[Served]) -> Mapping[str, Figure]:
    return {
        name: Figure.of([one.tokens_per_s for one in served], "tokens/s"),
        f"{name}: half of the requests within": Figure.of([one.percentile_ms(50) for one in served], "ms"),
        f"{name}: 95 of 100 within": Figure.of([one.percentile_ms(95) for one in served], "ms"),
    }


SERIES = Series(
    "benchmarks.tenants",
    PREFIX,
    others={"forward": partial(many, decodes=False), "decode": partial(many, decodes=True), "greedy": greedy},
)

ShapeName = Annotated[str | None, typer.Option(help=f"measure a random span instead: {', '.join(SHAPES)}")]
Blocks = Annotated[int, typer.Option(help="blocks of the random span", min=1)]


def main(
    only: Only = None,
    again: Again = False,
    repeats: Repeats = 5,
    threads: Threads = None,
    model: Model = None,
    shape: ShapeName = None,
    blocks: Blocks = 28,
    device: Annotated[str, typer.Option(help="of the random span")] = "cuda",
    dtype: Annotated[str, typer.Option(help="of the random span")] = "bfloat16",
) -> None:
    """Measure, print a table of each row and add it to the results.

    Example: python -m benchmarks.tenants --shape llama-3-8b --device cuda --dtype bfloat16
    """
    console = Console()
    if shape is None:
        SERIES.measure(Asked(only, again, repeats, threads, model), console)
        return
    if shape not in SHAPES:
        raise typer.BadParameter(f"no shape {shape!r}; known are {', '.join(SHAPES)}")
    outcome = measure(Shape(shape, blocks, device, dtype), repeats, 64)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    said = f"python -m benchmarks.tenants --shape {shape} --blocks {blocks} --device {device} --dtype {dtype}"
    Row.of_today(f"{PREFIX}{shape} on {where}", outcome, said, commit()[0], repeats).append()
    show(
        console, f"{blocks} blocks of {shape} on {where}", [[label, str(one)] for label, one in outcome.figures.items()]
    )
    show_targets(console, outcome)


if __name__ == "__main__":
    start(main)
