"""An edge that stops, dies or is started twice: the same seed gives the same bits, however often it was interrupted."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_client import counting
from edge_client.runs import RunDirectory
from isthmus.errors import InterruptedRunError
from isthmus.report.schema import RunReport
from isthmus.training.checkpoints import load_checkpoint
from isthmus.training.scoring import score
from tests.faults.conftest import Adapter
from tests.faults.training import (
    STEPS,
    WITHIN_S,
    Background,
    adapter,
    as_flags,
    command_here,
    is_one_line,
    paused,
    run_here,
    same_bits,
    settings,
    steps_done,
    wait_until,
)
from tests.harness import ENVIRONMENT, Server

FILE = "adapter/adapter_model.safetensors"


@contextmanager
def client_at(
    step: int, server: Server, rows: Path, out: Path, cache: Path, **changes: object
) -> Iterator[subprocess.Popen[str]]:
    """A client process that has done so many steps and waits in the middle of the next: its server stands still."""
    flags = as_flags(settings(server, rows, **changes))
    with subprocess.Popen(
        [sys.executable, "-m", "edge_client", "train", *flags, "--out", str(out)],
        env={**ENVIRONMENT, "ISTHMUS_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        try:
            wait_until(lambda: client.poll() is not None or steps_done(out) >= step, f"step {step}")
            with paused(server):
                assert client.poll() is None
                assert steps_done(out) < STEPS
                yield client
        finally:
            client.kill()


def test_the_same_seed_gives_the_same_bytes_in_this_process_and_in_another(
    servers: dict[str, Server], rows: Path, tmp_path: Path, cache: Path, undisturbed_run: Callable[..., Path]
) -> None:
    once = undisturbed_run(microbatches=1)
    run_here(settings(servers["llama"], rows, microbatches=1), tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (once / FILE).read_bytes()


def test_another_seed_gives_other_bits(
    servers: dict[str, Server], rows: Path, undisturbed: Callable[..., Adapter]
) -> None:
    assert not same_bits(undisturbed(microbatches=1), undisturbed(microbatches=1, seed=1))


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_client_killed_in_mid_step_resumes_to_the_same_bits(
    servers: dict[str, Server],
    rows: Path,
    tmp_path: Path,
    cache: Path,
    undisturbed: Callable[..., Adapter],
    microbatches: int,
) -> None:
    out = tmp_path / "run"
    with client_at(12, servers["llama"], rows, out, cache, microbatches=microbatches) as client:
        client.kill()
        client.wait(10)
    assert not (out / "run.json").exists()
    checkpoint = load_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert 5 <= checkpoint.step < STEPS

    report = run_here(RunDirectory(out).config(), out, resume=True)
    assert (report.status, report.steps) == ("complete", STEPS)
    assert same_bits(adapter(out), undisturbed(microbatches=microbatches))
    assert steps_done(out) == STEPS


def test_ctrl_c_ends_the_step_and_leaves_checkpoint_adapter_and_report_and_resumes_to_the_same_bits(
    servers: dict[str, Server], rows: Path, tmp_path: Path, cache: Path, undisturbed: Callable[..., Adapter]
) -> None:
    out = tmp_path / "run"
    with client_at(12, servers["llama"], rows, out, cache) as client:
        client.send_signal(signal.SIGINT)
        before = steps_done(out)
        servers["llama"].process.send_signal(signal.SIGCONT)
        _, said = client.communicate(timeout=WITHIN_S)
    assert client.returncode == 10, said
    assert "Traceback" not in said
    assert f"--resume --out {out}" in " ".join(said.split())
    report = RunReport.load(out)
    assert report.status == "interrupted"
    assert report.steps == steps_done(out)
    assert before <= report.steps <= before + 1
    checkpoint = load_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == report.steps
    assert (out / FILE).is_file()

    assert run_here(RunDirectory(out).config(), out, resume=True).status == "complete"
    assert same_bits(adapter(out), undisturbed(microbatches=1))


def test_a_run_that_was_complete_resumes_to_what_it_was(
    servers: dict[str, Server], rows: Path, tmp_path: Path, undisturbed: Callable[..., Adapter]
) -> None:
    out = tmp_path / "run"
    run_here(settings(servers["llama"], rows), out)
    report = run_here(RunDirectory(out).config(), out, resume=True)
    assert (report.status, report.steps) == ("complete", STEPS)
    assert same_bits(adapter(out), undisturbed(microbatches=1))


def test_resuming_with_another_learning_rate_is_refused_in_one_line(
    undisturbed_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = undisturbed_run(microbatches=1)
    code, said = command_here(monkeypatch, capsys, "train", "--resume", "--lr", "0.5", "--out", out)
    assert code == 2
    assert is_one_line(said), said
    assert "--lr" in said


def test_resuming_where_there_is_no_run_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = command_here(monkeypatch, capsys, "train", "--resume", "--out", tmp_path / "nothing")
    assert code == 13
    assert is_one_line(said), said


def test_a_new_run_in_a_used_directory_is_refused_and_touches_nothing(
    servers: dict[str, Server],
    rows: Path,
    undisturbed_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = undisturbed_run(microbatches=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    flags = as_flags(settings(servers["llama"], rows, seed=7))
    code, said = command_here(monkeypatch, capsys, "train", *flags, "--out", out)
    assert code == 13
    assert is_one_line(said), said
    assert "--resume" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_writer_of_a_directory_is_refused_and_the_first_goes_on(
    servers: dict[str, Server],
    rows: Path,
    tmp_path: Path,
    undisturbed: Callable[..., Adapter],
    resume: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = settings(servers["llama"], rows)
    run = Background(config, tmp_path / "run", monkeypatch)
    run.reaches(2)
    with paused(servers["llama"]):
        wait_until(lambda: run.in_flight > 0, "a request to be under way")
        flags = ["--resume"] if resume else as_flags(config)
        code, said = command_here(monkeypatch, capsys, "train", *flags, "--out", run.out)
        run.must_go_on()
    assert code == 13
    assert is_one_line(said), said
    assert "another process" in said
    assert run.result().status == "complete"
    assert same_bits(adapter(run.out), undisturbed(microbatches=1))


def test_ctrl_c_while_scoring_is_as_clean_as_while_training(
    servers: dict[str, Server], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return score(*given)

    with monkeypatch.context() as patch:
        patch.setattr(counting, "score", interrupted)
        with pytest.raises(InterruptedRunError, match="--resume"):
            run_here(settings(servers["llama"], rows, eval_data=rows, steps=4), tmp_path / "run")
    stopped = RunReport.load(tmp_path / "run")
    assert (stopped.status, stopped.steps) == ("interrupted", 0)  # not a training step later
    resumed = run_here(RunDirectory(tmp_path / "run").config(), tmp_path / "run", resume=True)
    assert (resumed.status, resumed.steps) == ("complete", 4)
