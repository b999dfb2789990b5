"""Runs on an emulator go on when the server goes away, and are used later in other ways than they were made."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from edge_client.finished import Using, evaluate
from edge_client.runs import RunDirectory
from edge_client.train import train
from emulator.build import Plan, build
from isthmus.cut import Cut
from isthmus.errors import RunError
from tests.faults.training import run_here, settings, steps_done, wait_until
from tests.harness import ENVIRONMENT, Server, run_command, serving
from tests.offsite.conftest import Node

QUIET = Console(quiet=True)
CAPTURED: Any = {"env": ENVIRONMENT, "capture_output": True, "text": True}


@pytest.fixture(scope="module")
def emulators(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two emulators of the tiny Llama, in 4 and in 8 bits."""
    place = tmp_path_factory.mktemp("emulators")
    for bits in (4, 8):
        build(Plan(tiny_models["llama"], Cut(1, 1), "quant", bits=bits), place / f"q{bits}", None, False, QUIET)
    return place


def offsite(folder: Path, data: Path, **changes: Any) -> Any:
    """Settings of a short run on an emulator that is here."""
    return settings(None, data, **{"method": "offsite", "emulator": str(folder), "cut": None, "steps": 4, **changes})


def test_what_was_fetched_once_needs_no_server_to_go_on(
    emulators: Path, tiny_models: dict[str, Path], rows: Path, tmp_path: Path, cache: Path
) -> None:
    command = [sys.executable, "-m", "edge_client", "train", "--out", str(tmp_path / "run")]
    fixed = ["--method", "offsite", "--data", str(rows), "--steps", "300", "--checkpoint-every", "5", "--threads", "1"]
    environment = {**ENVIRONMENT, "ISTHMUS_CACHE": str(cache)}
    with serving(tiny_models["llama"], "--cut", "1:1", "--emulators", str(emulators), cache=cache) as server:
        run = subprocess.Popen([*command, *fixed, "--server", server.address, "--emulator", "q4"], env=environment)
        wait_until(lambda: steps_done(tmp_path / "run") > 7, "step 7")
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 10
    resumed = run_command("edge_client", "train", "--resume", "--out", tmp_path / "run", cache=cache)
    assert resumed.returncode == 0, resumed.stderr
    used = json.loads((tmp_path / "run" / "run.json").read_text())["offsite"]["emulator"]
    again = ["--emulator", used, *fixed[:-6], "--steps", "2", "--out", str(tmp_path / "again")]
    other = run_command("edge_client", "train", *again, cache=cache)
    assert other.returncode == 0, other.stderr
    scored = run_command("edge_client", "evaluate", "--run", tmp_path / "run", "--data", rows, cache=cache)
    assert scored.returncode == 0, scored.stderr


def test_tuning_goes_on_without_its_looks_when_the_server_goes_away(
    emulators: Path, tiny_models: dict[str, Path], rows: Path, tmp_path: Path, cache: Path
) -> None:
    said, run = Console(record=True, quiet=False, file=(tmp_path / "said").open("w")), RunDirectory(tmp_path / "run")
    with serving(tiny_models["llama"], "--cut", "1:1", cache=cache) as server:
        config = offsite(emulators / "q4", rows, server=server.address, watch=20, steps=60, patience=0.5)
        thread = threading.Thread(target=lambda: train(config, run, False, said))
        thread.start()
        wait_until(lambda: steps_done(run.path) > 3, "step 3")
        server.stop(signal.SIGKILL)
        thread.join(60)
    report = json.loads((run.path / "run.json").read_text())
    assert (report["status"], report["steps"]) == ("complete", 60)
    assert len(report["offsite"]["watched"]) < 4
    assert "no more looks at the true span" in said.export_text()


def test_looks_can_be_given_up_when_a_run_is_resumed(emulators: Path, servers: dict[str, Server], rows: Path) -> None:
    config = offsite(emulators / "q4", rows, server=servers["llama"].address, watch=2)
    assert config.resumed({"watch": 0}).watch == 0


@pytest.mark.parametrize("peft_type", ["lora", "full"])
def test_ends_tuned_without_an_identity_are_plugged_in_with_one(
    peft_type: str, emulators: Path, node: Node, rows: Path, tmp_path: Path
) -> None:
    run_here(offsite(emulators / "q4", rows, peft=peft_type, lr=1e-3), tmp_path / "run")
    address, alice = f"localhost:{node.server.address.rpartition(':')[2]}", node.owner / "alice"
    wire = evaluate(tmp_path / "run", rows, Using("remote", address, alice), QUIET)
    here = evaluate(tmp_path / "run", rows, Using("local", model=str(node.model)), QUIET)
    assert wire.score.loss == pytest.approx(here.score.loss, rel=1e-6)
    placed = RunDirectory(tmp_path / "run").placed()
    on = {
        **placed,
        "method": "split",
        "server": address,
        "certs": alice,
        "from_run": tmp_path / "run",
        "eval_data": rows,
    }
    report = run_here(settings(None, rows, **{**on, "steps": 1}), tmp_path / "on")
    assert report.eval.before.loss == pytest.approx(here.score.loss, rel=1e-6)


def test_a_run_that_went_in_plaintext_is_used_with_certificates_later(
    emulators: Path, node: Node, rows: Path, tmp_path: Path
) -> None:
    run_here(offsite(emulators / "q4", rows, insecure=True), tmp_path / "run")
    address = f"localhost:{node.server.address.rpartition(':')[2]}"
    assert evaluate(tmp_path / "run", rows, Using("remote", address, node.owner / "alice"), QUIET).up_bytes > 0


def test_an_emulators_folder_that_was_replaced_is_noticed(emulators: Path, rows: Path, tmp_path: Path) -> None:
    shutil.copytree(emulators / "q4", tmp_path / "emulator")
    run_here(offsite(tmp_path / "emulator", rows), tmp_path / "run")
    shutil.rmtree(tmp_path / "emulator")
    shutil.copytree(emulators / "q8", tmp_path / "emulator")
    with pytest.raises(RunError, match="was tuned on another emulator"):
        evaluate(tmp_path / "run", rows, Using(), QUIET)


def test_the_run_to_begin_from_may_stand_in_the_configuration(emulators: Path, rows: Path, tmp_path: Path) -> None:
    run_here(offsite(emulators / "q4", rows, targets=["q_proj"], rank=3), tmp_path / "run")
    given = {"method": "offsite", "emulator": str(emulators / "q8"), "from_run": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**given, "data": str(rows), "steps": 1}))
    command = [sys.executable, "-m", "edge_client", "train", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run([*command, "--out", str(tmp_path / "on")], **CAPTURED)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "on" / "run.json").read_text())["params"]["rank"] == 3


def test_importances_are_of_modules_in_the_span_alone(servers: dict[str, Server], rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_client", "importances", "--method", "split", "--data", str(rows)]
    where = ["--server", servers["llama"].address, "--out", str(tmp_path / "scores.json")]
    done = subprocess.run([*command, *where], **CAPTURED)
    assert done.returncode == 2
    assert "give --method offsite, dlora or local" in done.stderr
    assert not (tmp_path / "scores.json").exists()
