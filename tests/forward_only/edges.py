"""Edges whose span only runs forward, the same placements in one process, and whole commands run in this one."""

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edge_client.assemble import load_local
from edge_client.attaching import Placement, attach
from edge_client.cli import main
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel
from edge_client.step import Gradients
from edge_client.tuning import Tuning
from isthmus.ledger.record import Ledger
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from tests.faults.training import as_flags
from tests.harness import Server
from tests.parity.reference import ALPHA, BLOCK_LIST, BLOCKS, RANK, connected, random_values
from tests.parity.test_training import stepping

SIDE = {"reduction": 4, "tap_every": 2, "tap_width": 24}
WAYS: dict[str, dict[str, Any]] = {
    "top": {"method": "split", "train": "top", "cut": "1:2"},
    "side": {"method": "side", "cut": "1:1", **SIDE},
}
"""How a run is told to train above the span alone."""

Targets = Sequence[str] | None


@contextmanager
def top_edge(
    server: Server,
    cut: str,
    kept: Path,
    kind: str = "lora",
    targets: Targets = None,
    ledger: Ledger | None = None,
    **settings: object,
) -> Iterator[tuple[EdgeModel, Tuning]]:
    """An edge that trains above the span, which runs in the server's process; its cache is at `kept`."""
    with connected(server, cut, ledger, train="top", cache=kept, **settings) as edge:
        yield edge, attach(edge.model, edge.found, edge.cut, placement(kind, targets))


def local_top(directory: Path, cut: str, kind: str = "lora", targets: Targets = None) -> tuple[EdgeModel, Tuning]:
    """The same placement on the whole model in this process."""
    edge = load_local(TrainConfig(method="local", data=Path("unused"), model=str(directory), cut=cut, train="top"))
    return edge, attach(edge.model, edge.found, edge.cut, placement(kind, targets))


def placement(kind: str, targets: Targets) -> Placement:
    """Only what stands above the span trains."""
    chosen = list(targets) if targets is not None else None
    return Placement(kind, RANK, ALPHA, chosen, seed=0, only_top=True)  # type: ignore[arg-type]


@contextmanager
def side_edge(server: Server, cut: str, kept: Path, ledger: Ledger | None = None) -> Iterator[tuple[EdgeModel, Tuning]]:
    """An edge with a side network whose taps come from the server's process."""
    config = TrainConfig.model_validate({"method": "side", "data": "unused", "server": "unused", **SIDE})
    with connected(server, cut, ledger, method="side", cache=kept, **SIDE) as edge:
        yield edge, attach(edge.model, edge.found, edge.cut, config.placement)


def local_side(directory: Path, cut: str) -> tuple[EdgeModel, Tuning]:
    """The same side network beside the whole model in this process."""
    given = {"method": "local", "peft": "side", "data": "unused", "model": str(directory), "cut": cut, **SIDE}
    config = TrainConfig.model_validate(given)
    edge = load_local(config)
    return edge, attach(edge.model, edge.found, edge.cut, config.placement)


def plain_top(whole: PreTrainedModel, family: str, cut: str, kind: str, targets: Targets, start: Tuning) -> nn.Module:
    """Plain Hugging Face, with plain `peft` where it has the method, trainable above the span alone."""
    names = [f"{BLOCK_LIST[family]}.{number}." for number in range(BLOCKS - int(cut[-1]), BLOCKS)]
    if kind == "lora":
        return _plain_lora(whole, tuple(names), family, targets, start)
    for name, parameter in whole.named_parameters():
        above = name.startswith(tuple(names))
        parameter.requires_grad_(above and (kind == "full" or name.endswith(".bias")))
    model: nn.Module = whole
    return model


def _plain_lora(
    whole: PreTrainedModel, above: tuple[str, ...], family: str, targets: Targets, start: Tuning
) -> nn.Module:
    usual = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}[family] if above else ("lm_head",)
    wanted = targets or usual
    modules = [
        name
        for name, module in whole.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and (
            (name in wanted and name == "lm_head")
            or (name.startswith(above) and (name.rpartition(".")[2] in wanted or "all-linear" in wanted))
        )
    ]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=modules,
        fan_in_fan_out=family == "gpt2" and modules != ["lm_head"],
    )
    adapted: nn.Module = peft.get_peft_model(whole, config).eval()
    own = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert own.keys() == start.trainable.keys()
    with torch.no_grad():
        for name, value in start.values().items():
            own[name].copy_(value)
    return adapted


def stirred(tuning: Tuning) -> None:
    """Give an adapter or a side network values under which every gradient matters; weights have such values."""
    if not tuning.initial:
        tuning.load(random_values(tuning.trainable))


def gradients(edge: EdgeModel, tuning: Tuning, batches: Sequence[Sequence[TokenSequence]]) -> Gradients:
    """Of one step whose microbatches are these."""
    with stepping(edge, tuning, len(batches)) as stepper:
        return stepper.gradients([Batch.of(part) for part in batches])


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> Done:
    """Run an `edge_client` command by its entry point, in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["edge_client", *map(str, arguments)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", argv))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        ended = stack.enter_context(pytest.raises(SystemExit))
        main()
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Finished:
    """A run that is complete: its directory, and where its outputs are kept."""

    out: Path
    kept: Path


def run_settings(way: str, address: str, data: Path, kept: Path, **changes: Any) -> TrainConfig:
    """A short run with three steps to the epoch."""
    usual = {"server": address, "data": data, "cache": kept, "batch_size": 8, "lr": 1e-2, "threads": 1}
    return TrainConfig.model_validate({**WAYS[way], **usual, **changes})


def carry_out(way: str, address: str, data: Path, place: Path, **changes: Any) -> Finished:
    """Train by the command line to the end, into `place`."""
    flags = as_flags(run_settings(way, address, data, place / "kept", **changes))
    done = command("train", *flags, "--out", place / "run")
    assert done.code == 0, done.err
    return Finished(place / "run", place / "kept")
