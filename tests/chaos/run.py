"""`make chaos`: storms one after another, each of a seed and a method, for so many minutes; the first bad one ends it.

Knows seeds and time; the storm and what it must leave stand beside it.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.chaos.history import judge
from tests.chaos.storm import CHECKPOINT_EVERY, STEPS, Storm
from tests.faults.training import run_here
from tests.harness import save_tiny_model, write_rows
from tests.kills.disturbed import Place, check_whole
from tests.kills.forked import forker
from tests.offsite.by_hand import make_emulator

METHODS = ("split", "four microbatches", "kill-and-revive", "top", "dlora")


def undisturbed(place: Place, method: str, out: Path) -> Path:
    """The run that a storm's must equal."""
    server = place.serve()
    settings = place.settings(method, server.address, out.parent, steps=STEPS, checkpoint_every=CHECKPOINT_EVERY)
    run_here(settings, out)
    server.kill()
    return out


def weathered(place: Place, method: str, expected: Path, out: Path, seed: int, seconds: float) -> str:
    """Let a storm rage and check what it left; returns what it did, in words."""
    storm = Storm(place, method, out, seed)
    storm.rage(seconds)
    processes = judge(storm.history, STEPS, CHECKPOINT_EVERY)
    check_whole(out, expected, STEPS)
    did = ", ".join(f"{count} x {name.replace('_', ' ')}" for name, count in sorted(storm.done.items()))
    return f"{processes} processes of the edge; {did}"


def main(
    minutes: Annotated[float, typer.Option(help="How long, about.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Of the first storm; each one after it has the next.")] = 0,
    each: Annotated[float, typer.Option(help="Seconds of each storm.")] = 30.0,
) -> None:
    """Disturb runs in every way there is, and check that each learns what an undisturbed one does."""
    say: Callable[[str], None] = typer.echo
    with TemporaryDirectory() as folder, forker() as forking:
        home = Path(folder)
        os.environ["ISTHMUS_CACHE"] = str(home / "cache")
        save_tiny_model(home / "model", "llama")
        make_emulator(home / "emulator", home / "model", "1:1", Ed25519PrivateKey.generate())
        rows = write_rows(home / "rows.jsonl")
        place = Place(forking, home / "model", home / "emulator", rows, home / "cache", home / "nodes")
        expected: dict[str, Path] = {}
        until, number = time.monotonic() + 60 * minutes, seed
        while time.monotonic() < until:
            method = METHODS[number % len(METHODS)]
            if method not in expected:
                expected[method] = undisturbed(place, method, home / f"undisturbed-{method}" / "run")
            out = home / f"storm-{number}" / "run"
            out.parent.mkdir()
            say(f"seed {number}, {method}: {weathered(place, method, expected[method], out, number, each)}")
            number += 1
        say(f"{number - seed} storms, and every run learnt what an undisturbed one does")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
