"""Runs on an emulator go on when the server goes away, and are used later in other ways than they were made."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from edge_client.cli import app
from edge_client.config import TrainConfig
from edge_client.finished import Using, evaluate
from edge_client.runs import RunDirectory
from edge_client.submitting import submit
from emulator.build import Plan, build
from isthmus.cut import Cut
from isthmus.errors import ForbiddenError, RunError, UsageError
from isthmus.report.schema import RunReport
from isthmus.settings import validated
from tests.faults.training import run_here, settings, steps_done, wait_until
from tests.harness import ENVIRONMENT, Server, run_command, serving
from tests.offsite.by_hand import make_run
from tests.offsite.conftest import Node

QUIET = Console(quiet=True)
USED = "5e" * 32
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


@pytest.mark.parametrize("named", ["./q4", "emulators/q4", "/somewhere/q4", "..", ".", "~/q4"])
def test_an_emulator_that_is_written_as_a_path_is_a_folder(named: str, rows: Path, tmp_path: Path) -> None:
    config = offsite(Path("x"), rows, emulator=named, server="h:1")
    assert config.emulator_folder is not None
    assert config.emulator_folder.is_absolute()
    assert "~" not in str(config.emulator_folder)


def test_a_servers_name_stays_one_wherever_the_command_is_given(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever folders there are, and however often the run's settings are read again."""
    run, config = RunDirectory(tmp_path / "run"), offsite(Path("x"), rows, emulator="q4", server="h:1")
    run.path.mkdir()
    run.begin(config)
    (tmp_path / "q4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert offsite(Path("x"), rows, emulator="q4", server="h:1").emulator == "q4"
    assert run.config().emulator == run.config().resumed({}).emulator == "q4"
    here = offsite(Path("x"), rows, emulator="q4")
    assert here.emulator_folder == tmp_path / "q4"
    assert validated(TrainConfig, {**here.model_dump(), "server": "h:1"}).emulator_folder == tmp_path / "q4"
    (tmp_path / USED).mkdir()
    assert offsite(Path("x"), rows, emulator=USED).emulator_folder is None


def test_insecure_given_later_stands_in_place_of_the_runs_certificates_and_the_other_way_round(
    emulators: Path, servers: dict[str, Server], node: Node, rows: Path, tmp_path: Path
) -> None:
    alice = node.owner / "alice"
    shutil.copytree(node.emulators / "half", tmp_path / "half")
    trusting = offsite(tmp_path / "half", rows, certs=alice)
    run_here(trusting, tmp_path / "run")
    plain = servers["llama"].address
    assert evaluate(tmp_path / "run", rows, Using("remote", plain, insecure=True), QUIET).up_bytes > 0
    with pytest.raises(UsageError, match="--certs and --insecure contradict each other"):
        evaluate(tmp_path / "run", rows, Using("remote", plain, alice, insecure=True), QUIET)
    with pytest.raises(ForbiddenError, match="takes no adapters"):
        submit(tmp_path / "run", plain, None, True, QUIET)
    resumed = trusting.resumed({"insecure": True})
    assert (resumed.certs, resumed.insecure) == (None, True)
    assert (trusting.resumed({}).certs, trusting.resumed({}).insecure) == (alice, False)
    back = resumed.resumed({"certs": alice})
    assert (back.certs, back.insecure) == (alice, False)


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_is_not_done_is_not_handed_in(status: str, node: Node, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", node.model)
    RunReport.load(run).model_copy(update={"status": status}).save(run)
    with pytest.raises(
        RunError, match=f"is not done: it ended {status} after step 120; go on with .*--resume --out {run}"
    ):
        submit(run, node.server.address, node.owner / "alice", False, QUIET)


def test_a_run_that_is_being_written_is_not_handed_in(node: Node, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", node.model, seed=7)  # other tests hand in the one of seed 0
    with RunDirectory(run).locked(), pytest.raises(RunError, match=r"another process is writing .*; wait for it"):
        submit(run, node.server.address, node.owner / "alice", False, QUIET)
    assert submit(run, node.server.address, node.owner / "alice", False, QUIET).bundle
    with pytest.raises(RunError, match="holds no run"):
        submit(tmp_path / "misspelt", node.server.address, node.owner / "alice", False, QUIET)
    assert not (tmp_path / "misspelt").exists()


def test_importances_say_what_they_send() -> None:
    said = " ".join(CliRunner().invoke(app, ["importances", "--help"], env={"COLUMNS": "200"}).output.split())
    assert "With --method dlora, hidden states and gradients of the rows are sent" in said
