"""Runs whose span's outputs are kept: their settings, what they left behind, and a server that comes and goes.

`results` is everything that must be equal where two runs are said to be the same.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from edge_client.config import TrainConfig
from isthmus.report.schema import RunReport
from tests.faults.training import kill, port_of, run_here, settings
from tests.harness import ENVIRONMENT, Server

METHODS: dict[str, dict[str, Any]] = {
    "top": {"train": "top"},
    "side": {"method": "side", "tap_every": 1, "tap_width": 16},
}


def kept(server: Server, data: Path, where: Path, method: str = "top", **changes: Any) -> TrainConfig:
    """A run of two epochs whose outputs are kept in `where`, scored before and after."""
    usual = {"cache": where, "eval_data": data, "steps": 6, **METHODS[method]}
    return settings(server, data, **{**usual, **changes})


def run_kept(server: Server, data: Path, where: Path, out: Path, method: str = "top", **changes: Any) -> RunReport:
    """Carry such a run out in this process."""
    report = run_here(kept(server, data, where, method, **changes), out)
    assert report.status == "complete"
    return report


def fetched(report: RunReport) -> int:
    """Rows that a run had to fetch."""
    use = report.cost.wire.cache
    assert use is not None
    return use.train.fetched_rows + use.eval.fetched_rows


def entries(where: Path) -> list[Path]:
    """The cache's files."""
    return sorted(where.rglob("*.safetensors"))


def results(out: Path) -> tuple[dict[str, torch.Tensor], list[float], bytes | None]:
    """A run's adapter, losses, and scores by row."""
    (adapter,) = (out / "adapter").glob("*.safetensors")
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = out / "scores.json"
    return load_file(adapter), losses, scores.read_bytes() if scores.exists() else None


def same(one: Path, other: Path) -> bool:
    """Whether two runs came to the same in every bit, and to something."""
    (adapter, losses, scores), (adapter_, losses_, scores_) = results(one), results(other)
    equal = adapter.keys() == adapter_.keys() and all(torch.equal(adapter[name], adapter_[name]) for name in adapter)
    return bool(adapter) and bool(losses) and equal and losses == losses_ and scores == scores_


@contextmanager
def client(cache: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """An `edge_client` process, killed if it is still there in the end."""
    command = [sys.executable, "-m", "edge_client", *map(str, arguments)]
    environment = {**ENVIRONMENT, "ISTHMUS_CACHE": str(cache)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class Visiting:
    """A server that comes and goes, always on the same port."""

    def __init__(self, start: Callable[[int], Server]) -> None:
        self._start = start
        self.server = start(0)

    @property
    def here(self) -> bool:
        return self.server.process.poll() is None

    def come(self) -> Server:
        if not self.here:
            self.server = self._start(port_of(self.server))
        return self.server

    def go(self) -> Server:
        """Terminate it; what is returned still tells its address."""
        if self.here:
            self.server.stop()
        return self.server

    def end(self) -> None:
        kill(self.server)
