"""Runs that several tests look at, each made once."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from edge_client import train as training
from edge_client.config import TrainConfig
from edge_client.runs import RunDirectory
from tests.harness import Server
from tests.methods.cases import CUT, Case
from tests.parity.test_training import UNCOUNTED

STEPS = 4

Run = Callable[..., Path]


def carry_out(config: TrainConfig, out: Path, resume: bool = False, counted: bool = False) -> str:
    """Train by the command's own code, which counts operations only where told: that takes longer than these runs."""
    console = Console(file=io.StringIO(), width=1000)
    with pytest.MonkeyPatch.context() as patched:
        if not counted:
            patched.setattr(training, "count_edge_flops", lambda *_: UNCOUNTED)
        training.train(config, RunDirectory(out), resume, console)
    return console.file.getvalue()


@pytest.fixture(scope="package")
def configured(servers: dict[str, Server], tiny_models: dict[str, Path], rows: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of a case, over the wire or in one process."""

    def make(case: Case, family: str, method: str = "split", **changes: object) -> TrainConfig:
        where = {"server": servers[family].address} if method == "split" else {"model": str(tiny_models[family])}
        sizes = {"steps": STEPS, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 2, "deterministic": True}
        given = {"method": method, "data": rows, "cut": CUT, **where, **sizes, "peft": case.name, **case.settings}
        return TrainConfig.model_validate({**given, **changes})

    return make


@pytest.fixture(scope="package")
def made(configured: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The directory of a case's run of a few steps."""
    runs: dict[tuple[str, ...], Path] = {}

    def make(case: Case, family: str, method: str = "split") -> Path:
        key = (case.name, family, method)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("run") / "run"
            carry_out(configured(case, family, method), runs[key], counted=method == "split" and family == "llama")
        return runs[key]

    return make
