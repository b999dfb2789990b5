"""Whole runs whose adapters' values cross once a step: what they export, resume as, say and move."""

import io
from pathlib import Path

import peft
import pytest
from rich.console import Console

from edge_client import train as training
from edge_client.config import TrainConfig
from edge_client.runs import RunDirectory
from edge_client.span_values import SHOWN
from isthmus.errors import InterruptedRunError, IsthmusError
from isthmus.settings import validated
from tests.faults.training import adapter, run_here, same_bits, settings
from tests.harness import Server, write_rows
from tests.parity.reference import relative, whole_model

STEPS = 4
ARGUED = {"method": "dlora", "exchange": "parameters", "microbatches": 2, "steps": STEPS, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def test_a_run_exports_plain_pefts_folder_and_says_what_the_cloud_sees(
    servers: dict[str, Server], tiny_models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    said = io.StringIO()
    config = settings(servers["llama"], rows, **ARGUED, eval_data=rows)
    report = training.train(config, RunDirectory(tmp_path / "run"), False, Console(file=said, width=400))
    assert SHOWN in said.getvalue()
    assert report.exchange == "parameters"
    assert report.eval.after is not None
    whole = peft.PeftModel.from_pretrained(whole_model(tiny_models["llama"]), str(tmp_path / "run" / "adapter"))
    told = {**ARGUED, "method": "local", "model": str(tiny_models["llama"])}
    local = settings(None, rows, **told, eval_data=rows)
    reference = run_here(local, tmp_path / "local")
    assert relative(adapter(tmp_path / "run"), adapter(tmp_path / "local")) < 1e-3
    assert reference.eval.after is not None
    assert report.eval.after.loss == pytest.approx(reference.eval.after.loss, rel=1e-4)
    assert sum("lora_B" in name and bool(one.any()) for name, one in whole.named_parameters()) == 12


def test_an_interrupted_run_resumes_to_the_same_bits(
    servers: dict[str, Server], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(servers["gpt2"], rows, **ARGUED, kr_active=0.5, kr_warmup=1, kr_period=2)
    run_here(config, tmp_path / "whole")
    trainer = training._Trainer  # a run that is stopped between two steps, as a signal would
    step = trainer._step

    def stopped(self: training._Trainer) -> None:
        if self._at.step == 3:
            monkeypatch.setattr(trainer, "_step", step)
            raise InterruptedRunError("stopped here")
        step(self)

    monkeypatch.setattr(trainer, "_step", stopped)
    with pytest.raises(InterruptedRunError, match="stopped here"):
        run_here(config, tmp_path / "run")
    run_here(config, tmp_path / "run", resume=True)
    assert same_bits(adapter(tmp_path / "run"), adapter(tmp_path / "whole"))


def test_a_killed_ports_values_do_not_cross(servers: dict[str, Server], rows: Path, tmp_path: Path) -> None:
    moved = {}
    for share in (1.0, 0.25):
        picked = {"kr_active": share, "kr_criterion": "top"}
        report = run_here(settings(servers["llama"], rows, **ARGUED, **picked), tmp_path / str(share))
        moved[share] = report.cost.wire
    values = 8 * (32 + 32 + 32 + 16) * 4 * 4  # rank, q and v of a block, blocks of the span, bytes
    for spared in (moved[1.0].up_bytes - moved[0.25].up_bytes, moved[1.0].down_bytes - moved[0.25].down_bytes):
        assert spared == pytest.approx(STEPS * 0.75 * values, rel=0.1)


def test_values_cross_once_a_step_whatever_the_microbatches(
    servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    wires = []
    for exchange, parts in (("parameters", 1), ("parameters", 4), ("split", 4)):
        told = {**ARGUED, "microbatches": parts}
        if exchange == "split":
            told |= {"method": "split", "exchange": None}
        report = run_here(settings(servers["llama"], rows, **told), tmp_path / f"{exchange}{parts}")
        wires.append(report.cost.wire)
    assert wires[1].round_trips - wires[0].round_trips == 2 * 3 * STEPS
    assert wires[1].round_trips - wires[2].round_trips == 2 * STEPS
    values = 8 * (32 + 32 + 32 + 16) * 4 * 4 * STEPS
    for more in (wires[1].up_bytes - wires[2].up_bytes, wires[1].down_bytes - wires[2].down_bytes):
        assert values < more < 1.1 * values


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dropout": 0.1}, "--dropout"),
        ({"kr_active": 0.5, "kr_idle": "park"}, "--kr-idle"),
        ({"peft": "dora"}, "--peft"),
        ({"method": "split"}, "--exchange"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(changes: dict[str, object], word: str, rows: Path) -> None:
    given = {"method": "dlora", "exchange": "parameters", "server": "localhost:1", "data": rows, **changes}
    with pytest.raises(IsthmusError, match=word):
        validated(TrainConfig, given)
