"""Directories of runs written by hand: metrics and a ledger with figures of one's choice for every step."""

import json
from pathlib import Path
from typing import Any

from isthmus.ledger.record import Ledger
from isthmus.report.schema import RunReport

SECONDS = (0.4, 0.9, 0.5, 0.8, 0.6)
"""What steps take by the clock, again and again in this order: 0.6 s is the median."""

UP, DOWN = 1_000, 3_000
"""Bytes of the first step; each later one has 10 more, both ways."""


def loss_at(step: int) -> float:
    """The loss of a step."""
    return 4.0 / (1 + step / 10)


def metrics(steps: int) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`."""
    ends = [sum(SECONDS[each % len(SECONDS)] for each in range(step)) for step in range(1, steps + 1)]
    return [
        {
            "step": step,
            "loss": loss_at(step),
            "gradient_norm": 2.0 / step,
            "lr": 1e-3 / step,
            "seconds": round(end, 3),
            "tokens": 100 * step,
        }
        for step, end in enumerate(ends, start=1)
    ]


def spend(ledger: Ledger, step: int, active: tuple[str, ...] = (), wire: bool = True) -> None:
    """Spend what a step does and close it."""
    clock = SECONDS[(step - 1) % len(SECONDS)]
    ledger.add("train", real_tokens=100, padded_tokens=120, edge_forward_flops=10**9, edge_backward_flops=2 * 10**9)
    ledger.add("train", edge_forward_s=0.1, edge_backward_s=0.15, edge_update_s=0.02)
    if wire:
        ledger.add("train", up_bytes=UP + 10 * (step - 1), down_bytes=DOWN + 10 * (step - 1), round_trips=2)
        ledger.add("train", cloud_forward_s=0.05, cloud_backward_s=0.04, cloud_queue_s=0.01, edge_wait_s=clock - 0.28)
        ledger.add("train", cloud_forward_flops=5 * 10**9, cloud_backward_flops=4 * 10**9, cloud_port_s=0.0)
    for name in active:
        ledger.add("train", at=name, edge_forward_flops=1_000)
    ledger.close_step(step)


def write_steps(path: Path, steps: int, wire: bool = True) -> None:
    """The metrics and the ledger of so many steps."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(steps)))
    ledger = Ledger(path / "ledger.jsonl")
    ledger.add("fetch", up_bytes=71, down_bytes=2_000_000)
    ledger.peak("edge_peak_memory_bytes", 5_000_000)
    ledger.close_step(0)
    for step in range(1, steps + 1):
        spend(ledger, step, wire=wire)


def write_run(path: Path, run: RunReport, steps: int = 25) -> Path:
    """A whole directory with this report; its ledger is its own, and not what the report was made of."""
    write_steps(path, steps)
    run.save(path)
    return path
