"""`python -m benchmarks.devices`: what an edge takes, case by case, and what small boards would make of it.

Knows the cases that are measured, each against a `cloud_node serve` process, and writes the tables of docs/devices.md.
What is extrapolated stands in `benchmarks.boards`, and as tables in `benchmarks.board_tables`.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks import board_tables
from benchmarks.boards import (
    COMPUTED,
    COMPUTING,
    HELD,
    IMPORTED,
    LOADED,
    LOADING,
    PRODUCT,
    SPEED,
    STEP,
    STEPPING,
    TENSORS,
    TRAINS,
    WAITING,
    Edge,
    Spread,
)
from benchmarks.place import Place
from benchmarks.results import ROOT, Figure, Outcome, Row, latest
from benchmarks.series import Again, Asked, Model, Only, Repeats, Series, Threads, start
from benchmarks.shapes import BFLOAT16, FLOAT32, LLAMA_1B, NARROW, SMOLLM2, Shape
from benchmarks.tables import put, short, table
from isthmus.load import DTYPES

PAGE = ROOT / "docs" / "devices.md"
PREFIX = "devices/"
SIZE = 1024
"""Of the square matrices whose product is timed."""


@dataclass(frozen=True)
class Case:
    """One edge: its model, its ends, its batch and what trains in it."""

    name: str
    shape: Shape = SMOLLM2
    cut: str = "2:2"
    rows: int = 8
    tokens: int = 128
    lossy: int = 1
    peft: str = "lora"
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def said(self) -> list[str]:
        """As cells."""
        batch = f"{self.rows} x {self.tokens}, loss on {'all' if self.lossy == self.tokens else self.lossy}"
        return [self.shape.name, self.cut, batch, self.peft, self.dtype]

    @property
    def end_blocks(self) -> int:
        """Blocks on the edge."""
        return sum(map(int, self.cut.split(":")))

    @property
    def on_paper(self) -> Edge:
        """As `benchmarks.boards` reckons with it: its adapters are of LoRA."""
        value = FLOAT32 if self.dtype == "float32" else BFLOAT16
        return Edge(self.shape, self.cut, self.rows, self.tokens, self.lossy, value)


CASES = (
    Case("float32"),
    Case("bfloat16", dtype="bfloat16"),
    Case("row", rows=1),
    Case("short-rows", tokens=32),
    Case("loss-on-all", lossy=128),
    Case("cut-0:2", cut="0:2"),
    Case("cut-4:4", cut="4:4"),
    Case("ia3", peft="ia3"),
    Case("full", peft="full"),
    Case("narrow", NARROW, cut="1:1"),
    Case("1b", LLAMA_1B, cut="1:1", rows=1, dtype="bfloat16"),
)
ON_PAPER = {case.name: case.on_paper for case in CASES if case.peft == "lora"}


class _Apart(Place):
    """A place whose processes keep what they fetch in it."""

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "ISTHMUS_CACHE": str(self.directory / "cache")}


def measure(case: Case, place: Place) -> Outcome:
    """A process that only loads, so that the ends are in the cache; then the one that is measured."""
    apart = _apart(place, case.shape)
    with apart.node(case.dtype, case.cut) as address:
        flags = {"server": address, "certs": apart.edge_certs, "cut": case.cut, "rows": case.rows, "peft": case.peft}
        flags |= {"tokens": case.tokens, "lossy": case.lossy, "dtype": case.dtype}
        child = ["benchmarks.edge_process", *(text for flag, value in flags.items() for text in (f"--{flag}", value))]
        apart.run(*child, "--steps", 0)
        return _outcome(apart.run_json(*child, "--steps", place.repeats))


def _apart(place: Place, shape: Shape) -> Place:
    folder = place.directory / shape.name.partition(",")[0].replace(" ", "-")
    model = place.model if shape is SMOLLM2 else folder / "model"
    if not model.exists():
        _save_random(shape, model, place.model)
    folder.mkdir(exist_ok=True)
    shutil.rmtree(folder / "certs", ignore_errors=True)
    return _Apart(folder, model, place.threads, place.repeats)


def _save_random(shape: Shape, directory: Path, tokenizer: Path) -> None:
    """A model of `shape` with random weights, and any tokenizer: its text is never read."""
    torch.manual_seed(0)
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "vocab_size": shape.vocabulary}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=shape.blocks, tie_word_embeddings=shape.tied)
    AutoModelForCausalLM.from_config(config, dtype=DTYPES["bfloat16"]).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)


def _outcome(found: Mapping[str, Any]) -> Outcome:
    steps: list[dict[str, float]] = found["steps"]
    computing = [step["edge_forward_s"] + step["edge_backward_s"] for step in steps]
    flops = [step["edge_forward_flops"] + step["edge_backward_flops"] for step in steps]
    figures = {name: Figure(found[key], "") for name, key in ((HELD, "parameters"), (TRAINS, "trainable"))}
    stages = {IMPORTED: "imported", LOADING: "loading", LOADED: "loaded", STEPPING: "stepping", TENSORS: "tensors"}
    figures |= {name: Figure(found[key] / 1e6, "MB") for name, key in stages.items()}
    figures |= {
        STEP: Figure.of([step["s"] for step in steps], "s"),
        COMPUTING: Figure.of(computing, "s"),
        WAITING: Figure.of([step["edge_wait_s"] for step in steps], "s"),
        COMPUTED: Figure(flops[0] / 1e9, "GFLOP"),
        SPEED: Figure.of([each / 1e9 / spent for each, spent in zip(flops, computing, strict=True)], "GFLOP/s"),
    }
    return Outcome(figures, ())


def measure_product(place: Place) -> Outcome:
    """What one thread reaches where nothing else is asked of it: the product of two square matrices."""
    torch.set_num_threads(1)
    figures = {}
    for dtype in ("float32", "bfloat16"):
        left, right = (torch.randn(SIZE, SIZE).to(DTYPES[dtype]) for _ in range(2))
        speeds = []
        for _ in range(5 * place.repeats + 1):
            began = time.perf_counter()
            torch.mm(left, right)
            speeds.append(2 * SIZE**3 / (time.perf_counter() - began) / 1e9)
        figures[dtype] = Figure.of(speeds[1:], "GFLOP/s")
    return Outcome(figures, ())


SERIES = Series(
    "benchmarks.devices",
    PREFIX,
    others={PRODUCT: measure_product, **{case.name: partial(measure, case) for case in CASES}},
)


def measured() -> dict[str, Mapping[str, Figure]]:
    """The last figures of each row that has any."""
    rows = latest()
    return {name: rows[PREFIX + name].outcome.figures for name in SERIES.others if PREFIX + name in rows}


def tables() -> dict[str, str]:
    """Those of the page, by name."""
    found = measured()
    return {
        "memory": _table(found, (HELD, TRAINS, IMPORTED, LOADED, LOADING, STEPPING, TENSORS)),
        "seconds": _table(found, (STEP, COMPUTING, WAITING, COMPUTED, SPEED)),
        "product": _product(found[PRODUCT]),
        "origin": _origins(latest()),
        **board_tables.tables(found, ON_PAPER),
    }


def _table(found: Mapping[str, Mapping[str, Figure]], columns: tuple[str, ...]) -> str:
    units = [found[CASES[0].name][column].unit for column in columns]
    heading = [f"{column}, {unit}" if unit else column for column, unit in zip(columns, units, strict=True)]
    rows = [[*case.said, *(found[case.name][column].bare for column in columns)] for case in CASES]
    return table(["model", "cut", "batch", "trains", "dtype", *heading], rows)


def _product(speeds: Mapping[str, Figure]) -> str:
    rows = [[name, short(Spread.of(figure).high), figure.bare] for name, figure in speeds.items()]
    return table(["dtype", "best, GFLOP/s", "median (of all repeats), GFLOP/s"], rows)


def _origins(rows: Mapping[str, Row]) -> str:
    named = {"Edges": CASES[0].name, "The matrix product": PRODUCT}
    return "\n".join(f"- {what}: {_origin(rows[PREFIX + name])}" for what, name in named.items())


def _origin(row: Row) -> str:
    return f"`python -m benchmarks.devices --repeats {row.repeats}`, commit {row.commit}, {row.date}, on {row.machine}."


def main(
    only: Only = None, again: Again = False, repeats: Repeats = 5, threads: Threads = None, model: Model = None
) -> None:
    """Measure, and write the tables of docs/devices.md.

    Example: python -m benchmarks.devices --again --repeats 5
    """
    SERIES.measure(Asked(only, again, repeats, threads, model), Console())
    put(PAGE, tables())


if __name__ == "__main__":
    start(main)
