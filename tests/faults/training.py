"""Training in this process against real servers, and what is compared when it is over.

`run_here` is a whole run; `Background` is one in a thread, for tests that meanwhile do something to its server;
`Learner` takes single steps, for tests that must decide when each happens.
"""

import io
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from edge_client import assemble
from edge_client import train as training
from edge_client.assemble import connect
from edge_client.attaching import attach
from edge_client.cli import main
from edge_client.config import TrainConfig
from edge_client.edge_flops import count_edge_flops
from edge_client.edge_model import EdgeModel, device_of
from edge_client.runs import RunDirectory
from edge_client.step import Stepper
from isthmus.ledger.record import Ledger
from isthmus.report.schema import RunReport
from isthmus.training.batches import batch_at, split_rows
from isthmus.training.collate import Batch, summed_loss
from isthmus.training.data import read_examples
from isthmus.training.optimizer import Optimizer
from tests.harness import Server

STEPS = 40
WITHIN_S = 90.0


def settings(server: Server | None, data: Path, /, **changes: Any) -> TrainConfig:
    """A short deterministic run on cut 1:1."""
    usual = {"method": "split", "server": server and server.address, "data": data, "cut": "1:1", "steps": STEPS}
    fixed = {"batch_size": 8, "lr": 1e-2, "deterministic": True, "threads": 1, "checkpoint_every": 5}
    return TrainConfig.model_validate({**usual, **fixed, **changes})


def as_flags(config: TrainConfig) -> list[str]:
    """The same settings for a process."""
    given = config.model_dump(mode="json", exclude_unset=True)
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None]
    return [text for flag, value in flags for text in ([flag] if value is True else [flag, str(value)])]


def run_here(config: TrainConfig, out: Path, resume: bool = False) -> RunReport:
    """Train to the end."""
    return training.train(config, RunDirectory(out), resume, Console(file=io.StringIO()))


def command_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    """Exit code and standard error of an `edge_client` command, run by its entry point."""
    monkeypatch.setattr(sys, "argv", ["edge_client", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


class Background:
    """A run in a thread of its own."""

    def __init__(self, config: TrainConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out = out
        self._edges: list[EdgeModel] = []
        self._ended: list[RunReport | BaseException] = []
        # Only to look at the line while it is in use; the run gets the very same object.
        monkeypatch.setattr(assemble, "connect", lambda *given: self._seen(connect(*given)))
        self._thread = threading.Thread(target=self._run, args=(config,), daemon=True)
        self._thread.start()

    def _seen(self, edge: EdgeModel) -> EdgeModel:
        self._edges.append(edge)
        return edge

    def _run(self, config: TrainConfig) -> None:
        try:
            self._ended.append(run_here(config, self.out))
        except BaseException as error:  # noqa: BLE001 (handed to whoever asks for the result)
            self._ended.append(error)

    def reaches(self, step: int) -> None:
        """Wait until so many steps are done."""
        wait_until(lambda: bool(self._ended) or steps_done(self.out) >= step, f"step {step}")
        self.must_go_on()

    def must_go_on(self) -> None:
        """Fail if the run is over."""
        assert not self._ended, f"the run ended too early: {self._ended}"

    @property
    def in_flight(self) -> int:
        """Requests that have no answer yet."""
        return len(self._edges[0].link._pending) if self._edges and self._edges[0].link else 0

    def result(self, within_s: float = WITHIN_S) -> RunReport:
        """Wait for the report; raises what the run raised."""
        self._thread.join(within_s)
        assert self._ended, f"the run hangs after step {steps_done(self.out)}, at\n{self._stack()}"
        if isinstance(self._ended[0], BaseException):
            raise self._ended[0]
        return self._ended[0]

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else "no line: its thread has ended"


class Learner:
    """An edge that steps when told; `values` is its adapter."""

    def __init__(self, config: TrainConfig) -> None:
        self.ledger = Ledger()
        self.edge = connect(config, self.ledger, lambda *_: None)
        assert self.edge.remote is not None
        self.remote = self.edge.remote
        self._config = config
        self._examples = read_examples(config.data, self.edge.tokenizer, config.max_length).examples
        self.tuning = attach(self.edge.model, self.edge.found, self.edge.cut, config.placement)
        self._optimizer = Optimizer(self.tuning.trainable, config.clip_norm)
        flops = count_edge_flops(self.edge, self.tuning)
        self._stepper = Stepper(self.edge, self.tuning, self.ledger, flops, config.microbatches)

    def batches(self, step: int) -> list[Batch]:
        """The microbatches of a step."""
        config = self._config
        chosen = batch_at(tuple(len(row.train.ids) for row in self._examples), config.batch_size, config.seed, step)
        parts = split_rows(chosen, config.microbatches)
        return [Batch.of([self._examples[row].train for row in part]) for part in parts]

    def step(self, number: int) -> None:
        """One optimizer step."""
        self._optimizer.step(self._stepper.gradients(self.batches(number)).by_name, self._config.lr)

    def loss(self, batch: Batch) -> torch.Tensor:
        """A batch's loss with its graph, the backward still to come."""
        return summed_loss(self.tuning.model, batch, device_of(self.edge))

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        """The backward pass."""
        return list(torch.autograd.grad(loss, list(self.tuning.trainable.values())))

    @property
    def values(self) -> dict[str, torch.Tensor]:
        return self.tuning.values()

    def close(self) -> None:
        self._stepper.close()
        self.edge.close()


@contextmanager
def learning(config: TrainConfig) -> Iterator[Learner]:
    """A learner while in here."""
    learner = Learner(config)
    try:
        yield learner
    finally:
        learner.close()


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """The server process stands still in here; if it was not killed meanwhile, it goes on afterwards."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGCONT)


def kill(server: Server) -> None:
    """As a power cut would."""
    server.process.kill()
    server.process.wait(10)


def port_of(server: Server) -> int:
    return int(server.address.rpartition(":")[2])


def steps_done(out: Path) -> int:
    """Whole lines of a run's metrics."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll; fails with `what` after a long while."""
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.002)


def adapter(out: Path) -> dict[str, torch.Tensor]:
    """What a run has learnt."""
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two adapters are equal in every bit, and not empty."""
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(values: Sequence[torch.Tensor]) -> bool:
    """Whether something was learnt at all: LoRA's B begins at zero."""
    return any(bool(value.abs().max() > 0) for value in values)


def is_one_line(text: str) -> bool:
    return len(text.strip().splitlines()) == 1 and "Traceback" not in text
