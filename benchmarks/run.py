"""`python -m benchmarks.run`: measure what has no result for the present commit, then write the page.

Knows the list of benchmarks and their order; each is measured in a module of its own.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks import memory, page, step, throughput, volume
from benchmarks.place import Place
from benchmarks.results import Machine, Outcome, Row, commit, latest
from isthmus import command
from isthmus.errors import IsthmusError


@dataclass(frozen=True)
class Benchmark:
    """A row: its name, its title, how it is measured in words and in code."""

    name: str
    title: str
    method: str
    measure: Callable[[Place], Outcome]


STEP = (
    "SmolLM2-135M at cut 2:2, LoRA of rank 8 on the two bottom and two top blocks, a batch of 8 rows of 128 real "
    "tokens with the loss on the last token of each, computed in {dtype} and sent as it is (codec `none`). One process "
    "holds the whole model, and also the edge's ends, whose span a `cloud_node serve` process computes; both use all "
    "cores, since they never compute at the same time. A step is forward, backward and the optimizer's update. The "
    "echo sends the step's four messages (two up, two down) as raw bytes through a gRPC stream with mutual TLS. "
    "The difference of two long steps holds the noise of both; the hand-over is read inside each step instead."
)
THROUGHPUT = (
    "Requests of 2,048 tokens of 4,096 float32 values, four in flight, to a server whose engine returns its input: "
    "codec `{codec}`, check for values that are not finite, checksum, 1 MiB chunks, TLS, decoding, and the same on the "
    "way back. The echo moves as many raw bytes in messages of 1 MiB through the same gRPC with the same options. The "
    "two processes share the machine's cores."
)
VOLUME = (
    "`edge_client train --method split` for 20 steps on movie reviews of uneven length, float32 on both sides, codec "
    "`{codec}`, figures from the run's report. Bytes are gRPC messages as serialised with their 5-byte prefix; framing "
    "by HTTP/2, TLS and TCP comes on top. Hidden states and gradients cross once each way: 4 values of the hidden size "
    "per token."
)
MEMORY = (
    "LoRA of rank 8 at cut 2:2 on SmolLM2-135M in {dtype}, three steps of 8 rows of 128 tokens: an edge that holds the "
    "ends (`split`), and a process that holds the whole model (`local`). Process figures are high-water marks of "
    "resident memory and include Python and its libraries; tensors are weights, gradients and what autograd saved."
)

BENCHMARKS = (
    *(
        Benchmark(f"step-{dtype}", f"A step, {dtype}", STEP.format(dtype=dtype), partial(step.measure, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Benchmark(
            f"throughput-{codec}",
            f"Throughput, codec {codec}",
            THROUGHPUT.format(codec=codec),
            partial(throughput.measure, codec=codec),
        )
        for codec in ("none", "bf16", "int8")
    ),
    *(
        Benchmark(
            f"volume-{codec}",
            f"Bytes per token, codec {codec}",
            VOLUME.format(codec=codec),
            partial(volume.measure, codec=codec),
        )
        for codec in ("none", "bf16")
    ),
    *(
        Benchmark(
            f"memory-{dtype}",
            f"Memory of the edge, {dtype}",
            MEMORY.format(dtype=dtype),
            partial(memory.measure, dtype=dtype),
        )
        for dtype in ("float32", "bfloat16")
    ),
)


def main(
    only: Annotated[list[str] | None, typer.Option(help="name of a row to measure; may be repeated")] = None,
    again: Annotated[bool, typer.Option("--again", help="measure rows that have a result too")] = False,
    repeats: Annotated[int, typer.Option(help="turns of each timed measurement", min=1)] = 11,
    threads: Annotated[int | None, typer.Option(help="threads that each process computes with [all cores]")] = None,
    model: Annotated[Path | None, typer.Option(help="directory of SmolLM2-135M, if it is here already")] = None,
) -> None:
    """Measure, print a table and write docs/benchmarks.md.

    Example: python -m benchmarks.run --only step-float32 --repeats 3
    """
    console = Console()
    unknown = set(only or ()) - {benchmark.name for benchmark in BENCHMARKS}
    if unknown:
        known = ", ".join(benchmark.name for benchmark in BENCHMARKS)
        raise typer.BadParameter(f"no row is named {', '.join(sorted(unknown))}; known are {known}")
    at, unchanged = commit()
    done = {name for name, row in latest().items() if unchanged and row.commit == at} if not again else set()
    with TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        place = Place(Path(scratch), model, threads or Machine.here().cores, repeats)
        for benchmark in BENCHMARKS:
            if benchmark.name not in (only or [benchmark.name]):
                continue
            if benchmark.name in done:
                console.print(f"{benchmark.name}: has a result for commit {at}")
                continue
            _measure(benchmark, place, at, console)
    write_page()


def write_page() -> None:
    """Write docs/benchmarks.md from the last result of each row."""
    rows = latest()
    page.write(((each.title, each.method, rows[each.name]) for each in BENCHMARKS if each.name in rows), rows)


def _measure(benchmark: Benchmark, place: Place, at: str, console: Console) -> None:
    with console.status(f"{benchmark.name}: measuring"):
        outcome = benchmark.measure(place)
    said = f"python -m benchmarks.run --only {benchmark.name} --repeats {place.repeats} --threads {place.threads}"
    Row.of_today(benchmark.name, outcome, said, at, place.repeats).append()
    table = Table(title=benchmark.name, show_header=False)
    for name, figure in outcome.figures.items():
        table.add_row(name, str(figure))
    for target in outcome.targets:
        table.add_row(f"target: {target.text}", f"{target.reached}: {'met' if target.met else 'missed'}")
    console.print(table)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes it started end with it
    command.keep_freed_memory()  # as both commands do
    try:
        typer.run(main)
    except IsthmusError as error:
        sys.stderr.write(f"benchmarks: {error}\n")
        raise SystemExit(error.exit_code) from None
