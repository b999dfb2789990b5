"""A run that was killed still says what it spent: nothing is invented, and what its files tell is not lost."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_client.report_cli import report_of
from edge_client.runs import RunDirectory
from isthmus.errors import RunError
from isthmus.ledger.record import Ledger
from isthmus.report.schema import RunReport
from isthmus.training.checkpoints import Checkpoint, save_checkpoint
from tests.faults.test_resume import client_at
from tests.faults.training import command_here, run_here
from tests.harness import Server
from tests.kill_revive.conftest import KILLING
from tests.report.by_hand import DOWN, UP, loss_at, metrics, spend, write_steps
from tests.report.example import report

CONFIG = {"method": "split", "server": "localhost:1", "data": "/none/rows.jsonl", "cut": "2:2", "seed": 7, "rank": 8}
PORTS = tuple(f"{block}.self_attn.{module}_proj" for block in (9, 10) for module in "qv")


def crash(place: Path, steps: int = 6, **settings: Any) -> Path:
    """What a killed process leaves: no report, and last lines torn in the middle."""
    write_steps(place, steps)
    (place / "config.yaml").write_text(yaml.safe_dump(CONFIG | settings))
    for name in ("metrics.jsonl", "ledger.jsonl"):
        with (place / name).open("a") as file:
            file.write('{"step": 7, "pha')
    return place


def test_what_was_spent_is_reported_and_what_nobody_knows_is_null(tmp_path: Path) -> None:
    run = crash(tmp_path)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    found = report_of(run)
    assert (found.status, found.method, found.cut, found.seed, found.peft_type) == ("failed", "split", "2:2", 7, "lora")
    assert (found.steps, found.final_loss) == (6, loss_at(6))
    assert (found.tokens.real, found.tokens.padded) == (600, 720)
    wire = found.cost.wire
    assert wire.up_bytes == sum(UP + 10 * each for each in range(6))
    assert wire.down_bytes == sum(DOWN + 10 * each for each in range(6))
    assert (wire.by_phase.fetch.down_bytes, wire.round_trips) == (2_000_000, 12)
    assert (found.cost.edge.forward_flops, found.cost.cloud.backward_flops) == (6 * 10**9, 24 * 10**9)
    assert found.cost.edge.peak_memory_bytes == 5_000_000
    assert found.train_seconds == metrics(6)[-1]["seconds"]
    nulls = (found.model_digest, found.epochs, found.eval.rows, found.eval.after.loss, found.params.trainable)
    assert set(nulls) == {None}
    assert found.model == "unknown"
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_it_is_shown_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = crash(tmp_path / "crashed"), tmp_path / "out"
    for form in ("table", "md", "json", "html"):
        assert command_here(monkeypatch, capsys, "report", run, "--format", form, "--out", out)[0] == 0
        assert "failed" in out.read_text()
        assert ("6150" if form == "json" else "6.15 kB") in out.read_text()


def test_killed_before_its_first_step_it_has_spent_what_it_fetched(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    found = report_of(tmp_path)
    assert (found.steps, found.tokens.real, found.cost.edge.forward_flops) == (0, 0, None)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add("fetch", up_bytes=71, down_bytes=123)
    ledger.close_step(0)
    assert report_of(tmp_path).cost.wire.by_phase.fetch.down_bytes == 123


def test_one_that_still_goes_on_is_not_said_to_have_failed(tmp_path: Path) -> None:
    run = crash(tmp_path)
    with RunDirectory(run).locked():
        assert report_of(run).status is None
    assert report_of(run).status == "failed"


def test_one_that_went_on_after_its_report_and_was_killed_tells_what_it_spent_since(tmp_path: Path) -> None:
    crash(tmp_path)
    edge = {"forward_flops": 4 * 10**9}
    left = report(status="interrupted", steps=4)
    cost = left.cost.model_copy(update={"edge": left.cost.edge.model_copy(update=edge)})
    left.model_copy(update={"cost": cost}).save(tmp_path)
    found = report_of(tmp_path)
    assert (found.steps, found.status, found.cost.edge.forward_flops) == (6, "failed", 6 * 10**9)
    assert (found.model, found.params.trainable, found.params.changed) == (left.model, left.params.trainable, None)


def test_a_report_that_is_up_to_date_stands(tmp_path: Path) -> None:
    crash(tmp_path)
    for status in ("interrupted", "failed", "complete"):
        left = report(status=status)
        left.save(tmp_path)
        assert report_of(tmp_path) == left


def test_the_checkpoint_tells_the_model_the_first_scores_and_what_was_alive(tmp_path: Path) -> None:
    settings = {"method": "dlora", "kr_active": 0.25, "kr_period": 3, "kr_warmup": 2}
    run = crash(tmp_path, 0, **settings)
    (run / "ledger.jsonl").unlink()
    ledger = Ledger(run / "ledger.jsonl")
    alive = {1: PORTS, 2: PORTS, 3: PORTS[:1], 4: PORTS[:1], 5: PORTS[:2], 6: PORTS[3:], 7: PORTS[3:]}
    for step, names in alive.items():
        spend(ledger, step, names)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(7)))
    scores = {"nats": [1.0, 3.0], "tokens": [2, 2], "correct": [True, False], "real_tokens": 9, "padded_tokens": 12}
    state = {"policy": {"decisions": [[2, list(PORTS[:1])]]}, "left_edge": False}
    taking = state | {"trained": dict.fromkeys(PORTS, 2), "probed": dict.fromkeys(PORTS, 0)}
    made_of = {"model": "ab" * 32, "cut": "1:1", "evaluation file": "da" * 32}
    facts = {"before": scores, "taking_part": taking, "made_of": made_of, "begun_from": None, "real_tokens": 300}
    save_checkpoint(run / "checkpoints", Checkpoint(3, {}, facts))
    found = report_of(run)
    assert (found.model_digest, found.cut, found.eval_data) == ("ab" * 32, "1:1", "da" * 32)
    assert (found.eval.rows, found.eval.before.loss, found.eval.before.accuracy) == (2, 1.0, 0.5)
    assert decisions(found) == {2: (0,), 5: (3,)}
    assert found.ports is not None
    assert [port.trained_steps for port in found.ports.ports] == [5, 2, 2, 4]
    assert [port.probed_steps for port in found.ports.ports] == [0, 1, 0, 0]


def test_a_directory_without_any_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        report_of(tmp_path)
    with pytest.raises(RunError, match="does not exist"):
        report_of(tmp_path / "nothing")


def test_a_process_killed_in_mid_step_leaves_what_its_ledger_says_and_what_was_alive(
    servers: dict[str, Server], rows: Path, tmp_path: Path, cache: Path
) -> None:
    out = tmp_path / "run"
    with client_at(12, servers["llama"], rows, out, cache, **{**KILLING, "steps": 24}) as client:
        client.kill()
        client.wait(10)
    assert not (out / "run.json").exists()
    found, spent = report_of(out), Counter[str]()
    for line in (out / "ledger.jsonl").read_text().splitlines():
        if json.loads(line)["phase"] == "train":
            spent.update({name: value for name, value in json.loads(line).items() if isinstance(value, int)})
    assert (found.status, found.steps) == ("failed", 12)
    assert (found.cost.wire.up_bytes, found.cost.wire.down_bytes) == (spent["up_bytes"], spent["down_bytes"])
    assert found.cost.cloud.backward_flops == spent["cloud_backward_flops"]
    assert found.cost.wire.round_trips == spent["round_trips"]

    whole = run_here(RunDirectory(out).config(), out, resume=True)
    assert whole.status == "complete"
    alive = decisions(whole)
    assert len(alive) > len(decisions(found)) > 1
    assert decisions(found) == {step: names for step, names in alive.items() if step < 12}


def decisions(run: RunReport) -> dict[int, tuple[int, ...]]:
    """What was alive, by the step of each decision."""
    assert run.ports is not None
    assert run.ports.kill_revive is not None
    return {each.step: each.alive for each in run.ports.kill_revive.decisions}
