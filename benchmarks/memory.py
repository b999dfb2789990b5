"""Memory of an edge that holds the ends alone, against LoRA on the whole model, each in a process of its own.

Knows high-water marks. What Python and its libraries take before any weight is loaded is shown, not subtracted.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from benchmarks.batch import Steps, build, settings
from benchmarks.place import Place
from benchmarks.results import Figure, Outcome, Target
from isthmus import command
from isthmus.ledger.memory import peak_bytes, reset_peak, resident_bytes
from isthmus.ledger.record import Ledger

STEPS = 3
SIDES: tuple[Literal["split", "local"], ...] = ("split", "local")


def measure(place: Place, dtype: str) -> Outcome:
    """A process for each, after a first edge has fetched the ends into the cache."""
    shared = ["benchmarks.memory", "--dtype", dtype, "--threads", place.threads]
    with place.node(dtype) as address:
        split = [*shared, "split", "--server", address, "--certs", place.edge_certs]
        place.run(*split, "--steps", 0)
        found = {"split": place.run_json(*split), "local": place.run_json(*shared, "local", "--model", place.model)}
    return _outcome(found)


def _outcome(found: dict[str, dict[str, int]]) -> Outcome:
    figures = {}
    for key, label in (
        ("parameters", "parameters held"),
        ("imported", "process before loading"),
        ("loading", "process peak while loading"),
        ("stepping", "process peak over the steps"),
        ("tensors", "tensors' peak over the steps"),
    ):
        unit, scale = ("", 1.0) if key == "parameters" else ("MB", 1e-6)
        for side in SIDES:
            figures[f"{label}, {side}"] = Figure(found[side][key] * scale, unit)
    shares = {key: found["split"][key] / found["local"][key] for key in ("loading", "stepping")}
    reached = f"{shares['loading']:.2f} of it while loading, {shares['stepping']:.2f} over the steps"
    met = max(shares.values()) < 1
    reason = None if met else "what the libraries take outweighs the weights that the edge does not hold"
    return Outcome(figures, (Target("less memory than LoRA on the whole model", reached, met, reason),))


def _child(
    method: Annotated[str, typer.Argument(help="split or local")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")],
    threads: Annotated[int, typer.Option(help="threads for computing")],
    server: Annotated[str | None, typer.Option(help="HOST:PORT, for split")] = None,
    certs: Annotated[Path | None, typer.Option(help="folder of the edge's identity, for split")] = None,
    model: Annotated[str | None, typer.Option(help="directory of the model, for local")] = None,
    steps: Annotated[int, typer.Option(help="training steps")] = STEPS,
) -> None:
    """Print what one process needs, as JSON.

    Example: python -m benchmarks.memory local --model models/smollm2-135m --dtype float32 --threads 2
    """
    torch.set_num_threads(threads)
    imported, ledger = resident_bytes(), Ledger()
    reset_peak()
    edge = build(settings(method=method, server=server, certs=certs, model=model, dtype=dtype), ledger)
    loading = peak_bytes()
    reset_peak()
    training = Steps(edge, ledger)
    for _ in range(steps):
        training.step()
    found = {
        "parameters": training.parameters,
        "imported": imported,
        "loading": loading,
        "stepping": peak_bytes(),
        "tensors": training.peak_tensor_bytes,
    }
    edge.close()
    print(json.dumps(found))


if __name__ == "__main__":
    command.keep_freed_memory()
    typer.run(_child)
