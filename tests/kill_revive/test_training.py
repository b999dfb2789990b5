"""Kill-and-Revive in whole runs: what crosses is what the active ports say, what is useful lives, no bit is lost."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from edge_client import train as training
from edge_client.runs import RunDirectory
from isthmus.report.schema import RunReport
from isthmus.training.checkpoints import load_checkpoint
from tests.faults.test_resume import client_at
from tests.faults.training import adapter, run_here, same_bits, steps_done
from tests.harness import Server, byte_tokenizer, save_tiny_model, serving
from tests.kill_revive.conftest import KILLING, PERIOD, QUERIES_AND_VALUES, STEPS, WARMUP, Watched, watched
from tests.kill_revive.traffic import OUTPUTS, TARGETS, due_at, groups, payload_at

HIDDEN, VALUE_BYTES = 32, 4
FRAME_BYTES = 200
"""More than a message takes beside its tensors."""


def train_lines(out: Path) -> list[dict[str, Any]]:
    """The ledger's line of each training step, in order."""
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["phase"] == "train"]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return found


WIRES = [
    {"cut": "1:1", "microbatches": 1},
    {"cut": "0:2", "microbatches": 2, "codec_port": "bf16"},
    {"cut": "0:2", "microbatches": 1, "kr_idle": "park"},
]


CROSSED = ("up_bytes", "down_bytes", "round_trips")


@pytest.mark.parametrize("wire", WIRES)
def test_the_bytes_of_every_step_are_exactly_what_its_active_ports_say(
    killing_run: Callable[..., Watched], wire: dict[str, Any]
) -> None:
    run = killing_run(targets=TARGETS, **wire)
    codec = wire.get("codec_port", "none")
    lines = train_lines(run.out)
    assert len(lines) == len(run.active) == STEPS
    assert {len(active) for active in run.active} == {16, 4, 8}  # warm-up, killed, probed
    for line, active, tokens in zip(lines, run.active, run.tokens, strict=True):
        due: dict[str, dict[str, int]] = {}
        for place, group in enumerate(groups(active)):
            at = due.setdefault(str(group[0]), dict.fromkeys(CROSSED, 0))
            for figure, value in due_at(group, tokens, codec, below=wire["cut"] == "1:1" or place > 0).items():
                at[figure] += value
        spent = {place: figures for place, figures in line["places"].items() if place.isdecimal()}
        assert {place: {name: figures[name] for name in CROSSED} for place, figures in spent.items()} == due


@pytest.mark.parametrize("wire", WIRES)
def test_a_step_costs_its_boundary_and_its_active_groups_and_nothing_else(
    killing_run: Callable[..., Watched], wire: dict[str, Any]
) -> None:
    run = killing_run(targets=TARGETS, **wire)
    ends_below, codec, parks = wire["cut"] == "1:1", wire.get("codec_port", "none"), "kr_idle" in wire
    for line, active, tokens in zip(train_lines(run.out), run.active, run.tokens, strict=True):
        met, count = groups(active), sum(tokens)
        parts = [payload_at(group, count, codec, ends_below or place > 0) for place, group in enumerate(met)]
        parked = line["up_payload_bytes"] - 2 * VALUE_BYTES * HIDDEN * count - sum(up for up, _ in parts)
        assert parked >= 0 if parks else parked == 0
        down = VALUE_BYTES * HIDDEN * count * (1 + ends_below) + sum(down for _, down in parts)
        assert line["down_payload_bytes"] == down
        assert line["round_trips"] == 2 * len(tokens) * (1 + len(met)) + (parked > 0)
        blocks = [spent for place, spent in line["places"].items() if place.isdecimal()]
        for way, inside in (("up", sum(up for up, _ in parts)), ("down", sum(down for _, down in parts))):
            boundary = line[f"{way}_bytes"] - sum(spent[f"{way}_bytes"] for spent in blocks)
            encoded = line[f"{way}_payload_bytes"] - inside
            assert encoded < boundary <= encoded + FRAME_BYTES * 2 * len(tokens) + (parked > 0) * 16 * FRAME_BYTES


def test_a_port_that_takes_no_part_computes_nothing(killing_run: Callable[..., Watched]) -> None:
    run = killing_run()
    for line, active in zip(train_lines(run.out), run.active, strict=True):
        assert {place for place in line["places"] if not place.isdecimal()} == active


def test_the_report_adds_up(killing_run: Callable[..., Watched]) -> None:
    run = killing_run()
    ports, wire, edge = run.done.ports, run.done.cost.wire, run.done.cost.edge
    assert ports is not None
    assert ports.kill_revive is not None
    assert tuple(port.name for port in ports.ports) == QUERIES_AND_VALUES
    per_step = [sum(tokens) for tokens in run.tokens]
    for port in ports.ports:
        assert port.trained_steps == sum(port.name in alive for alive in run.alive)
        here = [port.name in active for active in run.active]
        assert port.probed_steps == sum(here) - port.trained_steps
        down, up = 8 * HIDDEN, 8 * OUTPUTS[port.name.partition(".")[2]]
        tokens = sum(count for count, takes in zip(per_step, here, strict=True) if takes)
        assert port.edge_forward_flops == 2 * tokens * (down + up)
        assert port.edge_backward_flops == 2 * port.edge_forward_flops
    assert sum(port.probed_steps for port in ports.ports) == 2 * len(range(WARMUP + PERIOD - 1, STEPS, PERIOD))
    assert [step for step, _ in run.decisions] == list(range(WARMUP, STEPS, PERIOD))
    assert [frozenset(alive) for _, alive in run.decisions] == [run.alive[step] for step, _ in run.decisions]

    lines = train_lines(run.out)
    for block in ports.blocks:
        for figure in ("up_bytes", "down_bytes", "round_trips"):
            spent = sum(line["places"].get(str(block.block), {}).get(figure, 0) for line in lines)
            assert getattr(block, figure) == spent
    boundary = 2 * STEPS
    assert sum(block.round_trips for block in ports.blocks) == wire.round_trips - boundary
    assert 0 < sum(block.up_bytes for block in ports.blocks) < wire.up_bytes
    assert 0 < sum(block.down_bytes for block in ports.blocks) < wire.down_bytes
    assert sum(port.edge_forward_flops for port in ports.ports) < (edge.forward_flops or 0)


@pytest.mark.parametrize("criterion", ["gradient", "random", "top"])
def test_every_criterion_keeps_the_same_number_alive(killing_run: Callable[..., Watched], criterion: str) -> None:
    run = killing_run(kr_criterion=criterion)
    measures = criterion == "gradient"
    assert {len(alive) for _, alive in run.decisions} == {2}
    assert [step for step, _ in run.decisions] == (list(range(WARMUP, STEPS, PERIOD)) if measures else [0])
    assert {len(active) for active in run.active} == ({8, 2, 4} if measures else {2})
    if criterion == "top":
        assert set(run.active) == {frozenset(QUERIES_AND_VALUES[-2:])}


# Planted: of the span, task A's letters reach the loss through block 1 alone, and task B's through block 3.

LETTERS = {"A": "abcdefghijklm", "B": "nopqrstuvwxyz"}
PLANTED = {"A": "1.self_attn.v_proj", "B": "3.self_attn.v_proj"}
HALVES = {"A": slice(HIDDEN // 2), "B": slice(HIDDEN // 2, HIDDEN)}
SLIGHT, LOUD = 0.02, 8.0


@torch.no_grad()
def plant(model: PreTrainedModel, ids: dict[str, list[int]]) -> None:
    """Give each task half of the hidden values and one block that reads and writes that half; the others do little.

    Keys are zero, so that attention is even whatever is asked: no query matters. Embeddings are large beside what
    blocks add, so that the halves hardly mix.
    """
    other = {"A": "B", "B": "A"}
    for task, half in HALVES.items():
        model.get_input_embeddings().weight[ids[other[task]], half] = 0.0
    model.get_input_embeddings().weight.mul_(LOUD)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.zero_()
        layer.mlp.down_proj.weight.mul_(SLIGHT)
    useful = {int(name.partition(".")[0]): task for task, name in PLANTED.items()}
    for number, layer in enumerate(model.model.layers):
        if number not in useful:
            layer.self_attn.o_proj.weight.mul_(SLIGHT)
            continue
        unseen = HALVES[other[useful[number]]]
        layer.input_layernorm.weight[unseen] = 0.0
        layer.self_attn.o_proj.weight[unseen] = 0.0


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Server]:
    """A server of a model in which each task needs one module."""
    place = tmp_path_factory.mktemp("planted") / "tiny-planted"
    model = save_tiny_model(place, "llama")
    tokenizer = byte_tokenizer()
    plant(model, {task: tokenizer.convert_tokens_to_ids(list(letters)) for task, letters in LETTERS.items()})
    model.save_pretrained(place)
    with serving(place, "--cut", "1:1", cache=cache) as server:
        yield server


def write_tasks(path: Path, *tasks: str, rows: int = 24) -> Path:
    """For each task so many rows of its letters, one task after the other, all of one length."""
    drawn = random.Random(0)
    texts = ["".join(drawn.choices(LETTERS[task], k=12)) for task in tasks for _ in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("idle", ["drop", "park"])
@pytest.mark.parametrize("task", ["A", "B"])
def test_a_module_planted_as_the_only_useful_one_survives(
    planted: Server, tmp_path: Path, task: str, idle: str
) -> None:
    data = write_tasks(tmp_path / "rows.jsonl", task)
    run = watched(planted, data, tmp_path / "run", kr_active=1 / 8, kr_idle=idle)
    assert [alive for _, alive in run.decisions] == [(PLANTED[task],)] * len(range(WARMUP, STEPS, PERIOD))


@pytest.mark.parametrize("idle", ["drop", "park"])
def test_a_killed_one_is_revived_through_probes_when_the_task_changes(
    planted: Server, tmp_path: Path, idle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, changes = write_tasks(tmp_path / "rows.jsonl", "A", "B"), 10
    monkeypatch.setattr(
        training,
        "batch_at",
        lambda _, size, __, step: [24 * (step >= changes) + (size * step + at) % 24 for at in range(size)],
    )
    run = watched(planted, data, tmp_path / "run", kr_active=1 / 8, kr_period=2, kr_idle=idle, steps=30)
    before = {alive for step, alive in run.decisions if step <= changes}
    assert before == {(PLANTED["A"],)}
    assert run.decisions[-1][1] == (PLANTED["B"],)
    revived = next(step for step in range(changes, 30) if PLANTED["B"] in run.alive[step])
    assert any(PLANTED["B"] in run.active[step] - run.alive[step] for step in range(changes, revived))


def measured(out: Path) -> list[dict[str, Any]]:
    """A run's metrics but for the time they took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("changes", [{"kr_idle": "drop", "dropout": 0.1}, {"kr_idle": "park"}], ids=["drop", "park"])
def test_a_client_killed_in_mid_step_resumes_to_the_same_bits_decisions_and_metrics(
    servers: dict[str, Server],
    rows: Path,
    tmp_path: Path,
    cache: Path,
    killing_run: Callable[..., Watched],
    changes: dict[str, Any],
) -> None:
    settings = {"steps": 24, **changes}
    whole, out = killing_run(**settings), tmp_path / "run"
    with client_at(12, servers["llama"], rows, out, cache, **{**KILLING, **settings}) as client:
        client.kill()
        client.wait(10)
    checkpoint = load_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert 10 <= checkpoint.step < 24

    resumed = Watched(out, run_here(RunDirectory(out).config(), out, resume=True))
    assert (resumed.done.status, steps_done(out)) == ("complete", 24)
    assert resumed.decisions == whole.decisions
    assert measured(out) == measured(whole.out)
    assert same_bits(adapter(out), adapter(whole.out))
    assert steps_of(resumed.done) == steps_of(whole.done)


@pytest.mark.parametrize("idle", ["drop", "park"])
def test_a_run_that_was_complete_resumes_to_the_same_scores(
    killing_run: Callable[..., Watched], rows: Path, tmp_path: Path, idle: str
) -> None:
    whole, out = killing_run(kr_idle=idle, eval_data=rows, lr=5e-2), tmp_path / "run"
    shutil.copytree(whole.out, out)
    again = run_here(RunDirectory(out).config(), out, resume=True)  # a new session, which holds nothing parked yet
    assert again.eval == whole.done.eval
    assert same_bits(adapter(out), adapter(whole.out))


def steps_of(report: RunReport) -> list[tuple[str, int, int]]:
    """How often each port trained and was probed."""
    assert report.ports is not None
    return [(port.name, port.trained_steps, port.probed_steps) for port in report.ports.ports]
