"""Run as a program in a network namespace of its own: what crosses the loopback interface in each epoch, as JSON.

Arguments: the saved model, and a folder for caches. The kernel counts; nothing of ours does.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.forward_only.edges import gradients, side_edge, top_edge
from tests.harness import Server, serving
from tests.parity.reference import HIDDEN, ragged_sequences

CUTS = {"top": "1:2", "side": "1:1"}
EPOCHS, BATCHES, ROWS, TOKENS = 3, 4, 8, 120


def crossed() -> int:
    """Bytes that `lo` has received."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[0])


def settled() -> int:
    """The same once nothing is on its way."""
    before, now = -1, crossed()
    while now != before:
        time.sleep(0.2)
        before, now = now, crossed()
    return now


def epochs_of(way: str, server: Server, place: Path) -> list[int]:
    """Bytes of each epoch of a session of its own."""
    batches = [ragged_sequences([TOKENS] * ROWS, seed) for seed in range(BATCHES)]
    counted = []
    connect = top_edge if way == "top" else side_edge
    with connect(server, CUTS[way], place / way) as (edge, tuning):
        for _ in range(EPOCHS):
            before = settled()
            for batch in batches:
                gradients(edge, tuning, [batch])
            counted.append(settled() - before)
    return counted


def main(model: Path, place: Path) -> dict[str, object]:
    """Train some epochs each way beside a server of this namespace."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)  # noqa: S607 (wherever it is)
    torch.set_num_threads(1)
    os.environ["ISTHMUS_CACHE"] = str(place)
    offered = [flag for cut in CUTS.values() for flag in ("--cut", cut)]
    with serving(model, *offered, cache=place) as server:
        epochs = {way: epochs_of(way, server, place) for way in CUTS}
    tensors = 2 * BATCHES * ROWS * (TOKENS - 1) * HIDDEN * 4  # up and down, taps not counted
    return {"epochs": epochs, "tensor_bytes": tensors}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
