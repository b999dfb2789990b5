"""Whole runs with cores: what they leave behind, go on from, and are used by; and what is refused."""

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cloud_node.policy.authority import Authority
from edge_client.config import TrainConfig
from edge_client.exporting import export_cores
from edge_client.finished import Using, evaluate, reassembled
from edge_client.step import Gradients, Stepper
from isthmus.cut import Cut
from isthmus.errors import ForbiddenError, IsthmusError, UnreachableError, UsageError, WireError
from isthmus.ledger.record import Ledger
from isthmus.linears import Linear
from isthmus.ports import CORE, LORA, Port, check_ports
from isthmus.report.schema import RunReport
from isthmus.settings import validated
from isthmus.wire.gen import backbone_pb2 as pb
from tests.dlora.test_using import real_logits
from tests.faults.training import run_here, settings
from tests.harness import Server
from tests.parity.reference import padded, whole_model
from tests.parity.test_adapters import EXACT, plain_loaded

CORES: dict[str, Any] = {"method": "dlora", "exchange": "core", "rank": 4, "steps": 6, "lr": 3e-2}
OFTEN = {"checkpoint_every": 2}
KILLING = {"kr_active": 0.25, "kr_warmup": 2, "kr_period": 2}
QUIET = Console(file=io.StringIO())


def values_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter.safetensors")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(
    request: pytest.FixtureRequest, servers: dict[str, Server], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, RunReport]:
    """A family, a run's directory and its report."""
    out = tmp_path_factory.mktemp("core") / "run"
    return request.param, out, run_here(settings(servers[request.param], rows, eval_data=rows, **CORES), out)


def test_a_run_says_what_it_exchanged_and_leaves_its_cores_with_what_they_are_of(
    made: tuple[str, Path, RunReport],
) -> None:
    family, out, report = made
    assert (report.exchange, report.ports is not None) == ("core", True)
    about = json.loads((out / "adapter" / "manifest.json").read_text())
    told = json.dumps(about)
    assert report.model_digest in told
    assert '"init": "svd"' in told
    cores = values_of(out)
    assert report.params.trainable == sum(value.numel() for value in cores.values()) == 16 * len(cores)
    assert len(cores) == {"llama": 12, "gpt2": 6}[family]
    assert all(value.shape == (4, 4) and value.any() for value in cores.values())


def test_evaluating_over_the_wire_and_with_the_whole_model_is_the_same_and_what_training_saw(
    made: tuple[str, Path, RunReport], tiny_models: dict[str, Path], rows: Path
) -> None:
    family, out, report = made
    far = evaluate(out, rows, Using(), QUIET)
    near = evaluate(out, rows, Using("local", model=str(tiny_models[family])), QUIET)
    assert far.up_bytes > 0
    assert near.up_bytes == 0
    assert report.eval is not None
    assert far.score.loss == pytest.approx(near.score.loss, rel=1e-5)
    assert far.score.loss == pytest.approx(report.eval.after.loss, rel=1e-5)
    assert far.score.loss != evaluate(out, rows, Using(untouched=True), QUIET).score.loss


def test_plain_peft_loads_what_was_folded_and_gives_the_same_logits(
    made: tuple[str, Path, RunReport], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    family, out, _ = made
    home = tiny_models[family]
    assert export_cores(out, str(home), tmp_path / "lora", QUIET) == len(values_of(out))
    inputs = dict(zip(("input_ids", "attention_mask"), padded([range(3, 12), range(40, 45)], left=False), strict=True))
    with torch.no_grad():
        theirs = real_logits(plain_loaded(home, tmp_path / "lora"), inputs)
        before = real_logits(whole_model(home), inputs)
        with reassembled(out, Using(), Ledger(), QUIET) as (_, _, tuning):
            ours = real_logits(tuning.model, inputs)
    assert (theirs - before).abs().max() > 100 * EXACT
    assert (ours - theirs).abs().max() < EXACT


def test_without_the_whole_model_cores_are_said_to_work_over_the_wire_only(
    made: tuple[str, Path, RunReport], tmp_path: Path
) -> None:
    _, out, _ = made
    with pytest.raises(UsageError, match="over the wire only"):
        export_cores(out, None, tmp_path / "lora", QUIET)
    assert not (tmp_path / "lora").exists()


def stop_before(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let a run's line be gone when it begins this step, from 1."""
    gradients, steps = Stepper.gradients, itertools.count(1)

    def take(stepper: Stepper, *given: Any, **named: Any) -> Gradients:
        if next(steps) == step:
            raise UnreachableError("gone")
        return gradients(stepper, *given, **named)

    patch.setattr(Stepper, "gradients", take)


@pytest.mark.parametrize("changes", [{"init": "random", "microbatches": 2}, KILLING], ids=["all", "kill-and-revive"])
def test_a_run_that_stopped_resumes_to_the_same_bits(
    servers: dict[str, Server], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    config = settings(servers["llama"], rows, **{**CORES, **OFTEN, **changes})
    report = run_here(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_before(4, patch)
        with pytest.raises(UnreachableError, match="gone"):
            run_here(config, tmp_path / "stopped")
    run_here(config, tmp_path / "stopped", resume=True)
    whole, resumed = values_of(tmp_path / "whole"), values_of(tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert report.ports is not None
    if "kr_active" in changes:
        assert report.ports.kill_revive is not None
        alive = len(report.ports.kill_revive.decisions[-1].alive)
        assert alive == len(report.ports.ports) // 4
        assert len(whole) == alive + 4  # those of the ends are always there


REFUSED = {
    "too wide for its module": ({"rank": 17}, "1 to 16 fit there"),
    "too wide for anybody": ({"rank": 300}, "1 to 16 fit there"),
    "of no rank": ({"rank": 0}, "1 to 16 fit there"),
    "of no init": ({"init": "zeros"}, "use svd or random"),
    "at no module": ({"module": "mlp.no"}, "no linear module"),
    "with a tap's width": ({"width": 4}, "no linear module"),
    "outside the span": ({"block": 0}, "outside the span"),
    "a lora port with a rank": ({"kind": LORA}, "are of core ports"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_core_port_is_refused(what: str) -> None:
    right = Port(1, module="mlp.up", kind=CORE, rank=4, init="svd")
    linears = {(number, name): Linear(16, 40, False, (name,)) for number in (1, 2) for name in ("mlp.up", "mlp.to")}
    check_ports([right, replace(right, block=2)], Cut(1, 1), 4, 16, linears)
    changes, said = REFUSED[what]
    with pytest.raises(WireError, match=said):
        check_ports([replace(right, **changes)], Cut(1, 1), 4, 16, linears)
    for odd in (replace(right, block=2, rank=5), replace(right, block=2, init="random")):
        with pytest.raises(WireError, match="one rank, one init and one seed"):
            check_ports(sorted([right, odd]), Cut(1, 1), 4, 16, linears)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kr_active": 0.5, "kr_idle": "park"}, "not parked"),
        ({"rank": 257}, "at most 256 wide"),
        ({"dropout": 0.1}, "--dropout"),
        ({"exchange": "activations", "init": "svd"}, "--init"),
    ],
)
def test_settings_that_make_no_sense_with_cores_are_refused_in_words(
    rows: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        validated(TrainConfig, {"data": rows, "server": "localhost:1", **CORES, **changes})


def test_a_rank_that_a_module_has_no_room_for_is_refused_before_anything_is_asked(
    servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(IsthmusError, match="1 to 32 fit there"):
        run_here(settings(servers["llama"], rows, **{**CORES, "rank": 200}), tmp_path / "run")


def test_a_policy_that_does_not_name_the_exchange_refuses_it(tmp_path: Path) -> None:
    file, opening = tmp_path / "policy.yaml", pb.Open(bottom=1, top=1, ports=[pb.Port(kind=CORE, block=1)])
    for exchanges, refused in (("[activations]", "exchange core"), ("[]", "exchange core"), ("[core]", None)):
        rights = "models: ['*'], methods: [dlora], cuts: ['*']"
        file.write_text(f"tenants: {{alice: {{{rights}, exchanges: {exchanges}}}}}\n")
        authority = Authority(file, ("tiny", "digest"), 32)
        if refused is None:
            authority.require_session("spiffe://isthmus/edge/alice", opening)
            continue
        with pytest.raises(ForbiddenError, match=refused):
            authority.require_session("spiffe://isthmus/edge/alice", opening)
