"""What `edge_client evaluate` notes of a run on an emulator, and what the report then takes for plugged in."""

import io
import signal
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from edge_client.config import TrainConfig
from edge_client.finished import Using, evaluate
from edge_client.runs import RunDirectory
from isthmus.errors import InterruptedRunError
from isthmus.report.evaluated import Line, read
from isthmus.report.offsite import Table, tables
from isthmus.report.schema import RunReport
from tests.faults.training import run_here, settings
from tests.offsite.by_hand import make_emulator

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def emulator(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulators") / "half"
    make_emulator(folder, tiny_models["llama"], "1:1", Ed25519PrivateKey.generate())
    return folder


def offsite(emulator: Path, data: Path) -> TrainConfig:
    changes: dict[str, Any] = {"method": "offsite", "emulator": str(emulator), "cut": None, "eval_data": data}
    return settings(None, data, **changes, steps=6, lr=0.05)


def stopped_after(step: int, config: TrainConfig, run: Path, monkeypatch: pytest.MonkeyPatch) -> RunReport:
    """A run whose user pressed Ctrl-C in its step of this number."""
    write = RunDirectory.write_metrics

    def stop(self: RunDirectory, **figures: Any) -> None:
        write(self, **figures)
        if figures["step"] == step:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_metrics", stop)
        with pytest.raises(InterruptedRunError):
            run_here(config, run)
    return RunReport.load(run)


def table(run: Path) -> Table:
    (found,) = tables({"run": RunReport.load(run)}, {"run": read(run)})
    return found


def test_an_evaluation_says_what_was_scored_and_keeps_the_figures_of_each_row(
    emulator: Path, tiny_models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    report = run_here(offsite(emulator, rows), tmp_path)
    assert report.offsite is not None
    whole = str(tiny_models["llama"])
    given = Using(), Using(untouched=True), Using("local", model=whole), Using("local", model=whole, untouched=True)
    said = [evaluate(tmp_path, rows, using, QUIET) for using in given]
    lines = read(tmp_path).evaluations
    assert [Line(**vars(one), per_row=line.per_row) for one, line in zip(said, lines, strict=True)] == list(lines)
    assert [one.adapter for one in lines] == [report.adapter, None, report.adapter, None]
    assert [one.emulator for one in lines] == [report.offsite.emulator] * 2 + [None] * 2
    assert all(one.per_row.are_of(one.score) and len(one.per_row.nats) == one.rows for one in lines)
    own = read(tmp_path)
    assert own.after is not None
    assert own.before is not None
    assert lines[0].per_row.nats == pytest.approx(own.after.nats, rel=1e-5)
    assert lines[1].per_row.nats == pytest.approx(own.before.nats, rel=1e-5)


def test_the_evaluation_of_a_run_that_was_stopped_is_not_that_of_the_run_that_went_on(
    emulator: Path, tiny_models: dict[str, Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = stopped_after(2, offsite(emulator, rows), tmp_path, monkeypatch)
    assert (stopped.status, stopped.steps) == ("interrupted", 2)
    plugged = Using("local", model=str(tiny_models["llama"]))
    early = evaluate(tmp_path, rows, plugged, QUIET)
    untouched = evaluate(tmp_path, rows, Using("local", model=plugged.model, untouched=True), QUIET)
    assert table(tmp_path).plugged_in.score == early.score
    done = run_here(RunDirectory(tmp_path).config(), tmp_path, resume=True)
    assert (done.status, done.steps) == ("complete", 6)
    assert table(tmp_path).plugged_in.score is None
    assert table(tmp_path).untouched.score == untouched.score
    late = evaluate(tmp_path, rows, plugged, QUIET)
    assert late.score != early.score
    assert table(tmp_path).plugged_in.score == late.score
