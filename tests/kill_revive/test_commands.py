"""DLoRA and Kill-and-Revive on the command line: flags decide what is done, and what does not fit is refused."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM

from isthmus.report.schema import RunReport
from isthmus.wire.gen import backbone_pb2 as pb
from tests.harness import Server, run_command
from tests.kill_revive.conftest import PERIOD, QUERIES_AND_VALUES, STEPS, WARMUP, Command, Watched

SHORT = ("--method", "dlora", "--steps", "8", "--batch-size", "4", "--deterministic", "--threads", "1")
KILLING = ("--kr-active", "0.25", "--kr-warmup", "2", "--kr-period", "3")
FILE = "adapter/adapter_model.safetensors"


def decisions(out: Path) -> list[tuple[int, list[str]]]:
    """Steps and alive ports, from a run's report."""
    ports = RunReport.load(out).ports
    assert ports is not None
    assert ports.kill_revive is not None
    return [(made.step, [ports.ports[index].name for index in made.alive]) for made in ports.kill_revive.decisions]


def test_the_same_seed_decides_the_same_and_gives_the_same_bytes_in_any_process(
    servers: dict[str, Server], rows: Path, tmp_path: Path, cache: Path, command: Command
) -> None:
    flags = ("train", "--server", servers["llama"].address, "--data", rows, "--cut", "1:1", *SHORT, *KILLING)
    assert command(*flags, "--out", tmp_path / "one").code == 0
    again = run_command("edge_client", *flags, "--out", tmp_path / "two", cache=cache)
    assert again.returncode == 0, again.stderr
    assert command(*flags, "--seed", "1", "--out", tmp_path / "other").code == 0
    assert [step for step, _ in decisions(tmp_path / "one")] == [2, 5]
    assert decisions(tmp_path / "one") == decisions(tmp_path / "two")
    assert RunReport.load(tmp_path / "one").ports == RunReport.load(tmp_path / "two").ports  # whom it probed, too
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    assert (tmp_path / "one" / FILE).read_bytes() != (tmp_path / "other" / FILE).read_bytes()


def evaluated(command: Command, out: Path, rows: Path, *more: str | Path) -> dict[str, Any]:
    said = command("evaluate", "--run", out, "--data", rows, "--json", *more)
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


@pytest.mark.parametrize("idle", ["drop", "park"])
def test_what_is_evaluated_is_what_was_saved_wherever_the_span_runs(
    killing_run: Callable[..., Watched], tiny_models: dict[str, Path], rows: Path, command: Command, idle: str
) -> None:
    run = killing_run(kr_idle=idle, eval_data=rows, lr=5e-2)
    after, before = run.done.eval.after, run.done.eval.before
    over_the_wire = evaluated(command, run.out, rows)
    at_home = evaluated(command, run.out, rows, "--span", "local", "--model", tiny_models["llama"])
    assert over_the_wire["up_bytes"] > at_home["up_bytes"] == 0
    assert before.loss is not None
    assert after.loss is not None
    assert abs(after.loss - before.loss) > 0.01
    for found in (over_the_wire, at_home):
        assert found["loss"] == pytest.approx(after.loss, rel=1e-5)
        assert found["correct"] == after.correct


@pytest.mark.parametrize("idle", ["drop", "park"])
def test_an_adapter_holds_the_alive_modules_or_with_park_all_and_plain_peft_takes_it(
    killing_run: Callable[..., Watched], tiny_models: dict[str, Path], idle: str
) -> None:
    run = killing_run(kr_idle=idle)
    alive = set(QUERIES_AND_VALUES) if idle == "park" else run.alive[-1]
    ends = {f"{block}.self_attn.{name}" for block in (0, 5) for name in ("q_proj", "v_proj")}
    assert len(alive) == (8 if idle == "park" else 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    adapted = peft.PeftModel.from_pretrained(model, run.out / "adapter")
    found = {name: layer for name, layer in adapted.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    assert {name.partition(".layers.")[2] for name in found} == alive | ends
    assert all(bool(layer.lora_B["default"].weight.any()) for layer in found.values())


@pytest.mark.parametrize("idle", ["drop", "park"])
def test_values_leave_the_edge_when_they_are_parked_and_never_else_and_the_report_says_so(
    killing_run: Callable[..., Watched], rows: Path, command: Command, idle: str
) -> None:
    run = killing_run(kr_idle=idle, eval_data=rows, lr=5e-2)
    assert (run.passes[pb.PASS_PARK] > 0) == (idle == "park")
    policy = RunReport.load(run.out).ports
    assert policy is not None
    assert policy.kill_revive is not None
    assert (policy.kill_revive.idle, policy.kill_revive.left_edge) == (idle, idle == "park")
    said = command("report", run.out)
    line = next(line for line in said.out.splitlines() if "cloud" in line.lower() and "sent" in line.lower())
    assert line.split()[-1] == ("yes" if idle == "park" else "no")


def test_a_report_shows_which_ports_were_alive_when(killing_run: Callable[..., Watched], command: Command) -> None:
    run = killing_run()
    said = command("report", run.out)
    assert said.code == 0
    spans = [run.alive[0], *(frozenset(alive) for _, alive in run.decisions)]
    for block in range(1, 5):
        own = {name for name in QUERIES_AND_VALUES if name.startswith(f"{block}.")}
        strip = "".join("·▒█"[len(own & alive)] for alive in spans)
        line = next(line for line in said.out.splitlines() if line.split()[:2] == [str(block), strip])
        ports = run.done.ports
        assert ports is not None
        cost = next(cost for cost in ports.blocks if cost.block == block)
        assert float(line.split()[2]) == pytest.approx(cost.up_bytes / 1000, abs=0.006)
    assert len(spans) == 1 + len(range(WARMUP, STEPS, PERIOD))


def write_scores(path: Path, scores: object) -> Path:
    path.write_text(json.dumps(scores))
    return path


def test_scores_from_a_file_pick_the_ports_before_the_first_step(
    servers: dict[str, Server], rows: Path, tmp_path: Path, command: Command
) -> None:
    best = ["2.self_attn.v_proj", "4.self_attn.q_proj"]
    scores = write_scores(tmp_path / "scores.json", dict.fromkeys(QUERIES_AND_VALUES, 0.01) | dict.fromkeys(best, 9.0))
    flags = ("--server", servers["llama"].address, "--data", rows, "--cut", "1:1", "--out", tmp_path / "run")
    said = command("train", *flags, *SHORT, *KILLING, "--kr-scores", scores)
    assert said.code == 0, said.err
    first, *later = decisions(tmp_path / "run")
    assert first == (0, best)
    assert [step for step, _ in later] == [3, 6]
    ports = RunReport.load(tmp_path / "run").ports
    assert ports is not None
    assert ports.kill_revive is not None
    assert ports.kill_revive.criterion == "scores"
    assert all(port.trained_steps >= 3 for port in ports.ports if port.name in best)
    assert sum(port.trained_steps for port in ports.ports) == 8 * len(best)


WRONG_SCORES = {
    "not there": None,
    "not JSON": "{",
    "not UTF-8": b"\xff",
    "a list": [1.0],
    "of words": dict.fromkeys(QUERIES_AND_VALUES, "high"),
    "not finite": dict.fromkeys(QUERIES_AND_VALUES, 1.0) | {"2.self_attn.q_proj": float("nan")},
    "without a port": dict.fromkeys(QUERIES_AND_VALUES[1:], 1.0),
}


@pytest.mark.parametrize("wrong", WRONG_SCORES)
def test_scores_that_cannot_be_used_are_refused_before_any_data_is_sent_and_the_command_can_be_mended(
    servers: dict[str, Server], rows: Path, tmp_path: Path, command: Command, wrong: str
) -> None:
    path, content = tmp_path / "scores.json", WRONG_SCORES[wrong]
    if isinstance(content, str | bytes):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    elif content is not None:
        write_scores(path, content)
    flags = ("--server", servers["llama"].address, "--data", rows, "--cut", "1:1", "--out", tmp_path / "run")
    refused = command("train", *flags, *SHORT, *KILLING, "--kr-scores", path)
    assert refused.code == 2, refused.err
    assert refused.one_line, refused.err
    assert "--kr-scores" in refused.err
    assert not sent_data(tmp_path / "run")
    if wrong == "without a port":
        assert QUERIES_AND_VALUES[0] in refused.err
        write_scores(path, dict.fromkeys(QUERIES_AND_VALUES, 1.0))
        assert command("train", *flags, *SHORT, *KILLING, "--kr-scores", path).code == 0


def sent_data(out: Path) -> bool:
    """Whether anything made of rows left the edge, as the ledger has it."""
    ledger = out / "ledger.jsonl"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return any(json.loads(line)["phase"] in ("train", "eval", "generate") for line in lines)


@pytest.mark.parametrize("targets", ["lm_head", "no_proj", "q_proj,no_proj"])
def test_targets_that_the_span_has_not_are_refused_before_any_data_is_sent(
    servers: dict[str, Server], rows: Path, tmp_path: Path, command: Command, targets: str
) -> None:
    flags = ("--server", servers["llama"].address, "--data", rows, "--cut", "1:1", "--out", tmp_path / "run")
    refused = command("train", *flags, *SHORT, "--targets", targets)
    assert refused.code == 2, refused.err
    assert refused.one_line, refused.err
    assert "target" in refused.err
    assert not sent_data(tmp_path / "run")


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that must not be called."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


REFUSED = [
    ("--method split --kr-active 0.5", "--method dlora"),
    ("--method side --kr-active 0.5", "--method dlora"),
    ("--method local --model anything --cut 1:1 --kr-active 0.5", "--method dlora"),
    ("--method dlora --kr-active 0", "--kr-active"),
    ("--method dlora --kr-active 1.5", "--kr-active"),
    ("--method dlora --kr-active nan", "--kr-active"),
    ("--method dlora --kr-active few", "--kr-active"),
    ("--method dlora --kr-active 0.5 --kr-period 0", "--kr-period"),
    ("--method dlora --kr-active 0.5 --kr-warmup 0", "--kr-warmup"),
    ("--method dlora --kr-active 0.5 --kr-idle sleep", "--kr-idle"),
    ("--method dlora --kr-active 0.5 --kr-criterion best", "--kr-criterion"),
    ("--method dlora --kr-scores scores.json", "--kr-active"),
    ("--method dlora --kr-active 0.5 --kr-scores scores.json --kr-criterion random", "--kr-criterion"),
    ("--method split --kr-scores scores.json", "--method dlora"),
    ("--method split --kr-idle park", "--method dlora"),
    ("--method dlora --kr-idle park", "--kr-active"),
    ("--method dlora --kr-criterion random", "--kr-active"),
    ("--method dlora --kr-period 3", "--kr-active"),
    ("--method split --exchange activations", "--exchange"),
    ("--method side --exchange activations", "--exchange"),
    ("--method dlora --exchange cores", "--exchange"),
    ("--method dlora --train top", "--train"),
    ("--method dlora --peft full", "--peft"),
    ("--method dlora --peft bitfit", "--peft"),
    ("--method dlora --peft side", "--peft"),
    ("--method dlora --dropout 1", "--dropout"),
    ("--method dlora --dropout -0.1", "--dropout"),
    ("--method split --peft full --dropout 0.1", "--dropout"),
]


@pytest.mark.parametrize(("flags", "remedy"), REFUSED)
def test_flags_that_do_not_fit_are_refused_in_one_line_before_anything_is_sent(
    silent: socket.socket, rows: Path, tmp_path: Path, command: Command, flags: str, remedy: str
) -> None:
    server = () if "local" in flags else ("--server", f"127.0.0.1:{silent.getsockname()[1]}")
    refused = command("train", *flags.split(), *server, "--data", rows, "--out", tmp_path / "run")
    assert refused.code == 2, refused.err
    assert refused.one_line, refused.err
    assert remedy in refused.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(BlockingIOError):
        silent.accept()


def test_a_warm_up_in_which_nothing_would_ever_be_killed_is_refused(
    servers: dict[str, Server], rows: Path, tmp_path: Path, command: Command
) -> None:
    flags = ("--server", servers["llama"].address, "--data", rows, "--cut", "1:1", "--out", tmp_path / "run")
    said = command("train", *flags, *SHORT, *KILLING, "--kr-warmup", "50")
    assert said.code == 2
    assert "--kr-warmup" in said.err
