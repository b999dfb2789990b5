"""Runs that are killed and go on, and what must be true of one that was.

Knows how to start servers and edges as processes, and what they leave on the disk; kills nothing by itself.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_client.config import TrainConfig
from edge_client.runs import RunDirectory
from isthmus.adapter_files import OWN_WEIGHTS, PEFT_WEIGHTS
from isthmus.ledger.record import PHASES
from isthmus.report.schema import RunReport
from isthmus.training.checkpoints import load_checkpoint
from tests.faults.training import as_flags, settings
from tests.kills.cases import CHECKPOINT_EVERY, METHODS, STEPS
from tests.kills.forked import Forked, Forker


class At:
    """What settings ask of a server."""

    def __init__(self, address: str) -> None:
        self.address = address


@dataclass(frozen=True)
class Place:
    """A forker, and what servers and edges are told."""

    forking: Forker
    model: Path
    emulator: Path
    rows: Path
    cache: Path
    nodes: Path

    def serve(self, *flags: str | Path, listen: str = "127.0.0.1:0", fault: str = "") -> Forked:
        """A server of cut 1:1, in a process that may be armed; it is not awaited."""
        command = ("serve", "--model", self.model, "--cut", "1:1", "--threads", "1", "--listen", listen)
        return self.forking.start("cloud_node", *command, *flags, fault=fault, ISTHMUS_CACHE=str(self.nodes))

    def settings(self, method: str, address: str, kept: Path, **changes: Any) -> TrainConfig:
        """A short run of a method; `kept` is where its cache of outputs and nothing else is."""
        usual: dict[str, Any] = {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, **METHODS[method], **changes}
        if method in ("top", "side"):
            usual["cache"] = kept / "outputs"
        if method == "offsite":
            usual |= {"emulator": str(self.emulator), "cut": None}
        if method == "local":
            usual["model"] = str(self.model)
        return settings(At(address), self.rows, **usual)  # type: ignore[arg-type]

    def train(self, config: TrainConfig, out: Path, fault: str = "", **environment: str) -> Forked:
        """A new run in a process that may be armed."""
        return self._edge("train", *as_flags(config), "--out", out, fault=fault, **environment)

    def resume(self, out: Path, fault: str = "", **environment: str) -> Forked:
        """The run there goes on in a process that may be armed."""
        return self._edge("train", "--resume", "--out", out, fault=fault, **environment)

    def _edge(self, *flags: str | Path, fault: str, **environment: str) -> Forked:
        found = {"ISTHMUS_CACHE": str(self.cache), **environment}
        return self.forking.start("edge_client", *flags, fault=fault, **found)

    @contextmanager
    def reborn(self, server: Forked, *flags: str | Path) -> Iterator[list[Forked]]:
        """While in here, once this server dies another is started on its port; what was started is in the list."""
        address, others, over = server.address, list[Forked](), threading.Event()

        def watch() -> None:
            server.ended.wait()
            if not over.is_set():
                others.append(self.serve(*flags, listen=address))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            yield others
        finally:
            over.set()
            server.kill()
            watching.join()
            for other in others:
                other.kill()


def digest(out: Path) -> str:
    """SHA-256 of the file of a run's adapter."""
    (weights,) = [out / "adapter" / name for name in (PEFT_WEIGHTS, OWN_WEIGHTS) if (out / "adapter" / name).exists()]
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def check_whole(out: Path, expected: Path, steps: int = STEPS) -> None:
    """The run is complete, its adapter that of the other run, each step was committed once, and the ledger adds up."""
    report = RunReport.load(out)
    assert (report.status, report.steps) == ("complete", steps)
    assert digest(out) == digest(expected)
    assert report.adapter == digest(out)
    check_steps(out, expected, steps)
    sums = spent(out)
    for phase in PHASES:
        traffic = getattr(report.cost.wire.by_phase, phase)
        assert (sums[phase]["up_bytes"], sums[phase]["down_bytes"]) == (traffic.up_bytes, traffic.down_bytes), phase
    if (expected.parent / "outputs").exists():
        return  # what a killed process kept is not asked for again, and the step it died in stands in no ledger
    least = spent(expected)["train"]
    assert all(sums["train"][name] >= least[name] for name in ("edge_forward_flops", "edge_backward_flops"))


def check_steps(out: Path, expected: Path, steps: int) -> None:
    """Metrics have each step once, with the losses of the other run; the last checkpoint is of the last step."""
    mine, theirs = metrics(out), metrics(expected)
    assert [line["step"] for line in mine] == list(range(1, steps + 1))
    assert [line["loss"] for line in mine] == [line["loss"] for line in theirs]
    assert [line["tokens"] for line in mine] == [line["tokens"] for line in theirs]
    last, same = load_checkpoint(RunDirectory(out).checkpoints), load_checkpoint(RunDirectory(expected).checkpoints)
    assert last is not None
    assert same is not None
    assert last.step == same.step == steps
    assert last.tensors.keys() == same.tensors.keys()
    assert all(last.tensors[name].equal(value) for name, value in same.tensors.items())


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def spent(out: Path) -> dict[str, Counter[str]]:
    """The sums of ledger.jsonl by phase; counts of whole phases only."""
    sums: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
    for line in (out / "ledger.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "at" not in entry:
            sums[entry["phase"]].update({name: value for name, value in entry.items() if isinstance(value, int)})
    return sums
