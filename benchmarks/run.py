"""`python -m benchmarks.run`: measure what has no result for the present commit, then write the page.

Knows the list of benchmarks and their order; each is measured in a module of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from benchmarks import bookkeeping, choosing, memory, page, step, tenants, throughput, volume
from benchmarks.chapters import CHAPTERS
from benchmarks.place import Place
from benchmarks.results import Outcome, latest
from benchmarks.series import Again, Asked, Compare, Model, Only, Repeats, Series, Threads, start


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


SERIES = Series("benchmarks.run", others={benchmark.name: benchmark.measure for benchmark in BENCHMARKS})


def main(
    only: Only = None, again: Again = False, repeats: Repeats = 11, threads: Threads = None, model: Model = None
) -> None:
    """Measure, print a table of each row and write docs/benchmarks.md.

    Example: python -m benchmarks.run --only step-float32 --repeats 3
    """
    SERIES.measure(Asked(only, again, repeats, threads, model), Console())
    write_page()


def measure_chapter(
    series: Series, compare: Compare, chapter: page.Chapter, columns: Sequence[str], asked: Asked
) -> None:
    """Measure a series, compare its runs, and show what came of it: a chapter of docs/benchmarks.md, and a table.

    Args:
        series: whose rows the chapter has.
        compare: says how they differ, and what should be reached.
        chapter: of the page.
        columns: what of the chapter's table the terminal shows.
        asked: what the command line said.
    """
    console = Console()
    series.compare(series.measure(asked, console), compare)
    write_page()
    chapter.show(console, columns)


def write_page() -> None:
    """Write docs/benchmarks.md from the last result of each row, and the tables of docs/choosing.md."""
    rows = latest()
    sections = [
        *((each.title, each.method, each.name) for each in BENCHMARKS),
        *tenants.SECTIONS,
        *bookkeeping.SECTIONS,
    ]
    page.write(((title, method, rows[name]) for title, method, name in sections if name in rows), CHAPTERS, rows)
    choosing.write()


if __name__ == "__main__":
    start(main)
