"""Tuning on an emulator with no link, and what plugging in then gives."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from edge_client.cli import app
from edge_client.config import TrainConfig
from edge_client.finished import Using, continue_prompt, evaluate
from edge_client.importances import importances
from emulator.build import Plan, build
from isthmus.cut import Cut
from isthmus.errors import BundleError, UsageError
from isthmus.ledger.record import Ledger
from isthmus.report.units import size
from isthmus.settings import validated
from isthmus.training.collate import Batch, summed_loss
from isthmus.training.data import read_examples
from isthmus.training.outputs import select_outputs
from tests.conftest import FAMILIES
from tests.faults.training import run_here, settings
from tests.harness import ENVIRONMENT, Server
from tests.offsite.by_hand import flip

QUIET = Console(file=io.StringIO())
CAPTURED: Any = {"env": ENVIRONMENT, "capture_output": True, "text": True}
ENDS = ("1:1", "2:0", "0:2")

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def emulator(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Builds an emulator, once for each recipe: 4 bits a weight, unless told otherwise."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str = "llama", cut: str = "1:1", method: str = "quant", keep: float | None = None) -> Path:
        key = (family, cut, method, keep)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("emulators") / f"{family}-{cut.replace(':', '-')}-{method}"
            bits = 4 if method == "quant" else None
            build(Plan(tiny_models[family], Cut.parse(cut), method, keep, bits), made[key], None, False, QUIET)
        return made[key]

    return make


def offsite(folder: Path, data: Path, **changes: Any) -> Any:
    """Settings of a run on an emulator that is here."""
    usual = {"method": "offsite", "emulator": str(folder), "cut": None, "steps": 8, "eval_data": data}
    return settings(None, data, **{**usual, **changes})


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """A run's adapter."""
    found: dict[str, torch.Tensor] = load_file(run / "adapter" / "adapter_model.safetensors")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_emulator_equal_to_the_span_gives_every_figure_of_split(
    family: str, emulator: Make, servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    whole = emulator(family, "1:1", "drop", 4)
    here = run_here(offsite(whole, rows), tmp_path / "offsite")
    there = run_here(settings(servers[family], rows, steps=8, eval_data=rows), tmp_path / "split")
    mine, theirs = tensors(tmp_path / "offsite"), tensors(tmp_path / "split")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    same = ("eval", "tokens", "params", "steps", "epochs", "final_loss", "model_digest", "cut", "adapter")
    assert {name: getattr(here, name) for name in same} == {name: getattr(there, name) for name in same}
    work = here.cost.edge.forward_flops
    assert (work, there.cost.edge.forward_flops) != (None, None)
    assert work == (there.cost.edge.forward_flops or 0) + (there.cost.cloud.forward_flops or 0)


def test_tuning_sends_nothing_and_the_report_says_on_what_it_was_tuned(
    emulator: Make, rows: Path, tmp_path: Path
) -> None:
    report = run_here(offsite(emulator(), rows), tmp_path / "run")
    phases = report.cost.wire.by_phase.model_dump()
    assert {sum(phase.values()) for phase in phases.values()} == {0}
    assert report.cost.wire.round_trips == 0
    assert report.agreement is None
    assert report.offsite is not None
    manifest = (emulator() / "manifest.json").read_bytes()
    assert report.model_digest == json.loads(manifest)["model_digest"]
    assert (report.offsite.method, report.offsite.bits, report.offsite.blocks) == ("quant", 4, 4)
    assert report.offsite.weight_bytes < 0.3 * 4 * report.offsite.span_parameters
    assert report.offsite.watched == ()


@pytest.mark.parametrize("peft_type", ["lora", "full"])
@pytest.mark.parametrize("cut", ENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_plugging_in_is_exact_by_block_name(
    family: str, cut: str, peft_type: str, emulator: Make, servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    """The plugged-in model over the wire is the whole model here with the same adapter."""
    run = tmp_path / "run"
    model = Path(servers[family].process.args[5])  # type: ignore[index, arg-type]
    run_here(offsite(emulator(family, cut), rows, peft=peft_type, lr=1e-3), run)
    wire = evaluate(run, rows, Using("remote", servers[family].address), QUIET)
    here = evaluate(run, rows, Using("local", model=str(model)), QUIET)
    emulated = evaluate(run, rows, Using(), QUIET)
    assert wire.score.loss == pytest.approx(here.score.loss, rel=1e-6)
    assert wire.up_bytes > 0 == here.up_bytes == emulated.up_bytes
    assert emulated.score.loss != pytest.approx(here.score.loss, rel=1e-4)
    if peft_type == "lora":
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), run / "adapter").eval()
        select_outputs(plain.get_base_model())
        examples = read_examples(rows, AutoTokenizer.from_pretrained(model), 512).examples
        batch = Batch.of([example.train for example in examples])
        with torch.no_grad():
            loss = float(summed_loss(plain, batch, torch.device("cpu"))) / batch.counted
        assert here.score.loss == pytest.approx(loss, rel=1e-5)


def test_a_run_generates_with_the_emulator_and_with_the_true_span_alike_here_and_there(
    emulator: Make, servers: dict[str, Server], tiny_models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    run_here(offsite(emulator(), rows, lr=1e-1), tmp_path / "run")
    wire = continue_prompt(tmp_path / "run", "a gem", 8, Using("remote", servers["llama"].address), QUIET)
    here = continue_prompt(tmp_path / "run", "a gem", 8, Using("local", model=str(tiny_models["llama"])), QUIET)
    assert wire.text == here.text
    assert min(wire.up_bytes, wire.down_bytes) > 0 == here.up_bytes == here.down_bytes
    assert continue_prompt(tmp_path / "run", "a gem", 8, Using(), QUIET).text != here.text
    given = ["--run", str(tmp_path / "run"), "--prompt", "a gem", "--max-new-tokens", "8"]
    given += ["--span", "remote", "--server", servers["llama"].address]
    said = CliRunner().invoke(app, ["generate", *given]).stdout
    assert said == f"{wire.text}\n{size(wire.up_bytes)} up, {size(wire.down_bytes)} down\n"
    exact = json.loads(CliRunner().invoke(app, ["generate", *given, "--json"]).stdout)
    assert exact == {"prompt": "a gem", **vars(wire)}


def test_a_run_goes_on_against_the_true_span_from_where_plugging_in_left_it(
    emulator: Make, servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    earlier = run_here(offsite(emulator(), rows, targets=["q_proj", "up_proj"], rank=3), tmp_path / "offsite")
    plugged = evaluate(tmp_path / "offsite", rows, Using("remote", servers["llama"].address), QUIET)
    command = [sys.executable, "-m", "edge_client", "train", "--method", "split", "--server", servers["llama"].address]
    given = ["--from", str(tmp_path / "offsite"), "--data", str(rows), "--eval-data", str(rows), "--steps", "4"]
    done = subprocess.run(
        [*command, *given, "--lr", "0.01", "--out", str(tmp_path / "on")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "on" / "run.json").read_text())
    assert report["params"]["rank"] == 3
    assert report["begun_from"] == {"method": "offsite", "adapter": earlier.adapter}
    assert report["eval"]["before"]["loss"] == pytest.approx(plugged.score.loss, rel=1e-6)
    assert report["eval"]["after"]["loss"] < report["eval"]["before"]["loss"]
    wrong = subprocess.run(
        [*command, *given, "--rank", "4", "--out", str(tmp_path / "no")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2
    assert "--rank cannot differ from that of --from, which is 3" in wrong.stderr


def test_watching_sends_hidden_states_and_says_so(
    emulator: Make, servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    report = run_here(offsite(emulator(), rows, watch=3, server=servers["llama"].address), tmp_path / "run")
    assert report.offsite is not None
    assert [point.step for point in report.offsite.watched] == [0, 3, 6, 8]
    assert report.cost.wire.up_bytes == 0
    assert report.cost.wire.by_phase.eval.up_bytes > 0
    assert report.agreement is not None
    assert report.agreement.equal
    last = evaluate(tmp_path / "run", rows, Using("remote", servers["llama"].address), QUIET)
    assert report.offsite.watched[-1].loss == pytest.approx(last.score.loss, rel=1e-6)


def test_an_interrupted_run_goes_on_exactly(emulator: Make, rows: Path, tmp_path: Path) -> None:
    flags = ["--emulator", str(emulator()), "--data", str(rows), "--steps", "400", "--checkpoint-every", "5"]
    command = [sys.executable, "-m", "edge_client", "train", "--out", str(tmp_path / "run"), "--method", "offsite"]
    fixed = ["--deterministic", "--threads", "1", "--lr", "0.01"]
    process = subprocess.Popen([*command, *flags, *fixed], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 7) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 10, process.stderr
    done = subprocess.run([*command[:-2], "--resume"], **CAPTURED)
    assert done.returncode == 0, done.stderr
    run_here(offsite(emulator(), rows, eval_data=None, steps=400), tmp_path / "straight")
    straight, resumed = tensors(tmp_path / "straight"), tensors(tmp_path / "run")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_tuning_succeeds_where_there_is_no_network(emulator: Make, rows: Path, tmp_path: Path) -> None:
    namespaces = (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"])
    found = [one for one in namespaces if shutil.which("unshare") and not subprocess.run([*one, "true"]).returncode]
    if not found and os.geteuid() == 0:
        pytest.fail("nothing proves that tuning needs no network: allow root `unshare --net` here")
    if not found:
        pytest.skip("this kernel permits no network namespace to this user")
    command = [*found[0], sys.executable, "-m", "edge_client", "train", "--method", "offsite", "--steps", "3"]
    given = ["--emulator", str(emulator()), "--data", str(rows), "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, *given], **CAPTURED)
    assert done.returncode == 0, done.stderr
    assert tensors(tmp_path / "run")


def test_importances_of_an_emulator_equal_to_the_span_are_those_of_the_span(
    emulator: Make, tiny_models: dict[str, Path], servers: dict[str, Server], rows: Path
) -> None:
    picked = {"targets": ["q_proj", "v_proj"], "steps": 3, "rank": 2}
    ledger = Ledger()
    here = importances(offsite(emulator(method="drop", keep=4), rows, **picked), ledger, QUIET)
    assert ledger.total("train", "up_bytes") == 0
    local = {"method": "local", "model": str(tiny_models["llama"]), "exchange": "activations", **picked}
    assert here == importances(settings(None, rows, **local), Ledger(), QUIET)
    wire = importances(settings(servers["llama"], rows, method="dlora", **picked), Ledger(), QUIET)
    assert here == pytest.approx(wire, rel=1e-4)
    assert len(here) == 8
    assert min(here.values()) > 0


def test_an_emulator_that_lacks_blocks_has_no_importances(emulator: Make, rows: Path) -> None:
    with pytest.raises(UsageError, match="lacks blocks of the span; use one of `rank` or `quant`"):
        importances(offsite(emulator(method="share", keep=2), rows), Ledger(), QUIET)


def test_what_is_no_fitting_emulator_is_refused_with_the_reason(
    emulator: Make, tiny_models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    tampered = tmp_path / "tampered"
    shutil.copytree(emulator(), tampered)
    flip(tampered / "model.safetensors")
    with pytest.raises(BundleError, match="is not what its hash says"):
        run_here(offsite(tampered, rows), tmp_path / "a")
    with pytest.raises(UsageError, match="is no emulator; name a folder that `cloud_node emulator build` made"):
        run_here(offsite(tiny_models["llama"], rows), tmp_path / "b")
    several = tmp_path / "several"
    for name in ("rank-75", "quant-4"):
        shutil.copytree(emulator(), several / name)
    with pytest.raises(UsageError, match=rf"in it are quant-4, rank-75: name one, such as {several}/quant-4"):
        run_here(offsite(several, rows), tmp_path / "d")
    with pytest.raises(UsageError, match="the emulator is for cut 1:1, not 2:0; leave out --cut"):
        run_here(offsite(emulator(), rows, cut="2:0"), tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"emulator": None}, "needs --server HOST:PORT to fetch an emulator from, or --emulator DIR"),
        ({"watch": 5}, "--watch scores the true span, which needs --server"),
        ({"codec": "int8"}, "--codec is for what crosses, and nothing does with --method offsite"),
        ({"link": "1:1:1"}, "--link is for what crosses, and nothing does with --method offsite"),
        ({"method": "local", "model": "m", "cut": "1:1"}, "--emulator goes with --method offsite"),
        ({"peft": "side"}, "a side network stands beside all blocks, which an emulator lacks"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], reason: str, rows: Path) -> None:
    usual = {"method": "offsite", "emulator": "x", "data": rows}
    with pytest.raises(UsageError, match=reason):
        validated(TrainConfig, {**usual, **changes})
