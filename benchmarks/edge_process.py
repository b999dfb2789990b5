"""One edge in a process of its own: what it holds at each stage, and where the seconds of its steps go.

Knows high-water marks and the run's own ledger; knows neither cases nor pages.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.batch import RANK, build, settings
from edge_client.attaching import Placement, attach
from edge_client.edge_flops import count_edge_flops
from edge_client.peft_methods import METHODS
from edge_client.step import Stepper
from isthmus import command
from isthmus.ledger.memory import peak_bytes, reset_peak, resident_bytes
from isthmus.ledger.record import Ledger
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from isthmus.training.optimizer import Optimizer

RATE = 1e-4


def run(
    server: Annotated[str, typer.Option(help="HOST:PORT")],
    certs: Annotated[Path, typer.Option(help="folder of the edge's identity")],
    cut: Annotated[str, typer.Option(help="bottom:top")],
    rows: Annotated[int, typer.Option(help="of a batch")],
    tokens: Annotated[int, typer.Option(help="of a row")],
    lossy: Annotated[int, typer.Option(help="of them, those that carry loss, the last ones")],
    peft: Annotated[str, typer.Option(help="what trains")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")],
    steps: Annotated[int, typer.Option(help="after one that is not counted; 0: only load")],
) -> None:
    """Print what one edge on one thread needs, as JSON."""
    torch.set_num_threads(1)
    imported, ledger = resident_bytes(), Ledger()
    reset_peak()
    edge = build(
        settings(method="split", server=server, certs=certs, dtype=dtype).model_copy(update={"cut": cut}), ledger
    )
    loading, loaded = peak_bytes(), resident_bytes()
    reset_peak()
    has_rank = METHODS[peft].default("rank") is not None
    strength = (RANK, 2.0 * RANK) if has_rank else (None, None)
    tuning = attach(edge.model, edge.found, edge.cut, Placement(peft, *strength, None, 0))
    optimizer = Optimizer(tuning.trainable, 1.0)
    stepper = Stepper(edge, tuning, ledger, count_edge_flops(edge, tuning), 1)
    stepper.memory.hold("optimizer", optimizer.state_bytes)
    batch, spent = _batch(edge.model.config.vocab_size, rows, tokens, lossy), []
    for _ in range(steps + 1 if steps else 0):
        before, began = ledger.totals("train"), time.perf_counter()
        optimizer.step(stepper.gradients([batch]).by_name, RATE)
        after = ledger.totals("train")
        spent.append({name: after[name] - before.get(name, 0) for name in after} | {"s": time.perf_counter() - began})
    found = {
        "parameters": sum(parameter.numel() for parameter in edge.model.parameters()),
        "trainable": sum(parameter.numel() for parameter in tuning.trainable.values()),
        "imported": imported,
        "loading": loading,
        "loaded": loaded,
        "stepping": peak_bytes(),
        "tensors": stepper.memory.peak_bytes,
        "steps": spent[1:],
    }
    edge.close()
    print(json.dumps(found))


def _batch(vocabulary: int, rows: int, tokens: int, lossy: int) -> Batch:
    """Random real tokens."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocabulary, (rows, tokens + 1), generator=generator).tolist()
    counted = (*[False] * (tokens + 1 - lossy), *[True] * lossy)
    return Batch.of([TokenSequence(tuple(ids), counted) for ids in ids_BT])


if __name__ == "__main__":
    command.keep_freed_memory()
    typer.run(run)
