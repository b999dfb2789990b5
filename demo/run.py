"""The demonstration: one model owner, two data owners, three processes and a real network between them.

Run it with `make demo`. It reads top to bottom as what the three parties do; everything is kept under `demo-out/`.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cloud_node import models
from demo import reviews
from isthmus import command
from isthmus.trust import certificates

CUT = "2:2"
EDGES = {"movies": 1000, "products": 500}
"""Domain of each edge, and the rows it holds out."""

TRAINING = (
    *("--targets", "all-linear", "--steps", "110", "--batch-size", "8", "--lr", "1e-3", "--warmup-steps", "10"),
    *("--codec", "bf16", "--threads", "1"),
)
SAMPLE = {
    "movies": "Review: It is a clumsy, cheerless film, and twice as long as it needs to be.\nSentiment:",
    "products": "Review: The battery lasts for days and the sound is wonderful.\nSentiment:",
}
console = Console(highlight=False)
app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(out: Annotated[Path, typer.Option(help="where everything goes")] = Path("demo-out")) -> None:
    """Train two edges' adapters on one cloud node, and show what it cost each side."""
    began = time.monotonic()
    runs = out / "runs"
    for earlier in (runs, out / "certs", out / "cache"):
        shutil.rmtree(earlier, ignore_errors=True)

    say("The model owner fetches a model and makes certificates: its own, and one for each data owner")
    model = models.fetch("smollm2-135m", out / "models" / "smollm2-135m")
    certificates.init_authority(out / "certs")
    for name in EDGES:
        certificates.issue(out / "certs", name)

    say("Each data owner has reviews of its own, some of them held out")
    data = {name: reviews.prepare(out / "data", name, held_out) for name, held_out in EDGES.items()}  # type: ignore[arg-type]

    say("The cloud node starts: it holds blocks 2 to 27 of 30, and mutual TLS guards its port")
    with cloud_node(model, out) as address:
        say(f"Two edges train on {address}, at the same time; text and labels stay in their processes")
        edges = {name: start_edge(name, address, *files, out) for name, files in data.items()}
        try:
            outputs = {name: finish(edge) for name, edge in edges.items()}
        finally:
            for edge in edges.values():
                edge.terminate()  # those that are still at it because another failed
        say("The cloud node is told to stop: it finishes what is under way and exits")
    for name, output in outputs.items():
        say(f"What it cost: {name}")
        print(output)
    say("Both runs")
    report = [sys.executable, "-m", "edge_client", "report", *(str(runs / name) for name in EDGES)]
    subprocess.run(report, check=True)
    console.print(f"\nEverything is in {out}/: runs/*/run.json and runs/*/adapter above all.")
    console.print(f"It took {time.monotonic() - began:.0f} s.")


def environment(out: Path, party: str) -> dict[str, str]:
    """A party's own: nobody shares a cache with another."""
    cache = str((out / "cache" / party).resolve())
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ISTHMUS_CACHE": cache}


def say(text: str) -> None:
    """A heading."""
    console.print()
    console.print(f"[bold cyan]{text}[/]", soft_wrap=True)


def precision() -> str:
    """bfloat16 where the processor computes in it, float32 elsewhere."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


@contextmanager
def cloud_node(model: Path, out: Path) -> Iterator[str]:
    """A serving node on a free loopback port; yields its address, stops it with SIGTERM."""
    command = [sys.executable, "-m", "cloud_node", "serve", "--model", str(model), "--cut", CUT]
    flags = ["--certs", str(out / "certs" / "server"), "--listen", "localhost:0", "--dtype", precision()]
    process = subprocess.Popen([*command, *flags], env=environment(out, "cloud"), stdout=subprocess.PIPE, text=True)
    try:
        yield ready_address(process)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    if code != 0:
        raise typer.Exit(code)


def ready_address(process: "subprocess.Popen[str]") -> str:
    """Wait for the line that says where the node listens."""
    if process.stdout is not None:
        for line in process.stdout:
            console.print(line.rstrip())
            if line.startswith("cloud_node: ready on "):
                return line.split()[-1]
    raise typer.Exit(process.wait() or 1)


def start_edge(name: str, address: str, data: Path, held_out: Path, out: Path) -> "subprocess.Popen[str]":
    """An edge client; its progress appears here line by line, its report is kept for later."""
    command = [sys.executable, "-m", "edge_client", "train", "--method", "split", "--server", address]
    certs, run = out / "certs" / name, out / "runs" / name
    files = ["--certs", str(certs), "--data", str(data), "--eval-data", str(held_out), "--out", str(run)]
    process = subprocess.Popen(
        [*command, *files, "--dtype", precision(), "--sample", SAMPLE[name], *TRAINING],
        env=environment(out, name),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    threading.Thread(target=relay, args=(name, process), daemon=True).start()
    return process


def relay(name: str, process: "subprocess.Popen[str]") -> None:
    """Show an edge's progress under its name."""
    if process.stderr is not None:
        for line in process.stderr:
            console.print(f"[bold]{name:>8}[/]  {line.rstrip()}", soft_wrap=True)


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for an edge; returns what it printed, or ends with its exit code."""
    output = process.stdout.read() if process.stdout is not None else ""
    if process.wait() != 0:
        raise typer.Exit(process.returncode)
    return output.strip()


if __name__ == "__main__":
    command.run(app, "demo")
