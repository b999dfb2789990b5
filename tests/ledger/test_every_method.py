"""Whatever the method, each figure of a run belongs to a side, a phase and a step, and at ports to a block."""

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge_client.runs import RunDirectory
from emulator.build import build
from emulator.distil import DistilPlan
from emulator.plan import Plan
from isthmus.cut import Cut
from isthmus.report.fields.stage import Stage
from isthmus.report.schema import RunReport
from tests.faults.training import run_here, settings
from tests.harness import Server, write_rows

QUIET = Console(file=io.StringIO())
STEPS = 3

METHODS: dict[str, dict[str, Any]] = {
    "split": {},
    "top": {"train": "top"},
    "side": {"method": "side", "cut": "2:0", "tap_width": 8, "tap_every": 2},
    "dlora": {"method": "dlora", "exchange": "activations", "microbatches": 2},
    "parameters": {"method": "dlora", "exchange": "parameters", "microbatches": 2},
    "offsite": {"method": "offsite", "server": None},
    "local": {"method": "local", "server": None},
}

EDGE = {"edge_forward_flops", "edge_forward_s", "edge_peak_tensor_bytes", "edge_peak_memory_bytes", "seconds"}
GRADIENT = {"edge_backward_flops", "edge_backward_s", "edge_update_s"}
LINE = {"up_bytes", "down_bytes", "round_trips", "edge_wait_s"}
CLOUD = {"cloud_forward_flops", "cloud_forward_s", "cloud_queue_s", "cloud_port_s"}
NODE = {"cloud_peak_tensor_bytes", "cloud_peak_memory_bytes"}
OWNER = {"cloud_forward_s", "cloud_peak_tensor_bytes", "cloud_peak_memory_bytes", "seconds"}
OWNERS: dict[str, set[str]] = {
    "build": OWNER | {"cloud_forward_flops", "cloud_update_s", "stored_bytes"},
    "distil": OWNER | {"cloud_forward_flops", "cloud_backward_flops", "cloud_backward_s", "cloud_update_s", "steps"},
    "measure": OWNER | {"cloud_forward_flops"},
}


@dataclass(frozen=True)
class Done:
    """A run that is over."""

    method: str
    report: RunReport
    lines: list[dict[str, Any]]

    def stage(self, name: str) -> Stage:
        (found,) = [stage for stage in self.report.stages if stage.stage == name]
        return found


@pytest.fixture(scope="module")
def emulator(tiny_models: dict[str, Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled, distilled and measured, with the record of its costs beside it."""
    out = tmp_path_factory.mktemp("built") / "emulator"
    distillation = DistilPlan(STEPS, 4, 1e-3, 1, 0)
    plan = Plan(
        tiny_models["llama"],
        Cut.parse("1:1"),
        "rank",
        0.5,
        text=rows,
        distill=rows,
        distillation=distillation,
        max_length=48,
    )
    build(plan, out, None, False, QUIET)
    return out


@pytest.fixture(scope="module", params=METHODS)
def done(
    request: pytest.FixtureRequest,
    servers: dict[str, Server],
    tiny_models: dict[str, Path],
    emulator: Path,
    rows: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Done:
    method, out = request.param, tmp_path_factory.mktemp(request.param) / "run"
    held_out = write_rows(out.with_name("held-out.jsonl"), 8, seed=1)
    changes = {"steps": STEPS, "eval_data": held_out, "sample": "abc", "deterministic": False, **METHODS[method]}
    changes |= {"emulator": str(emulator)} if method == "offsite" else {}
    changes |= {"model": str(tiny_models["llama"])} if method == "local" else {}
    changes |= {"cache": tmp_path_factory.mktemp("outputs")} if method in ("top", "side") else {}
    report = run_here(settings(servers["llama"], rows, **changes), out)
    return Done(method, report, [json.loads(line) for line in RunDirectory(out)._ledger.read_text().splitlines()])


def missing(stage: Stage, figures: set[str]) -> set[str]:
    """Figures that the stage lacks."""
    return {name for name in figures if getattr(stage, name) is None}


def test_no_figure_is_missing_that_exists(done: Done) -> None:
    wired, gradients = done.method not in ("offsite", "local"), done.method in ("split", "dlora", "parameters")
    line, cloud = (LINE, CLOUD) if wired else (set(), set())
    assert not missing(done.stage("train"), EDGE | GRADIENT | line | cloud | {"steps", "stored_bytes"})
    assert not missing(done.stage("eval"), EDGE | (line if wired else set()))
    assert not missing(done.stage("generate"), EDGE - {"seconds"} | line | cloud)
    assert not missing(done.stage("fetch"), {"edge_peak_tensor_bytes", "edge_peak_memory_bytes"})
    if wired:
        assert not missing(done.stage("control"), {"up_bytes", "down_bytes", "edge_wait_s"} | NODE)
        assert ((done.stage("train").cloud_backward_flops or 0) > 0) == gradients
    assert (done.stage("train").edge_forward_flops or 0) > 0
    assert (done.stage("eval").edge_forward_flops or 0) > 0
    assert (done.stage("generate").edge_forward_flops or 0) > 0


def test_a_sides_figures_are_absent_where_the_side_had_no_part(done: Done) -> None:
    if done.method in ("offsite", "local"):
        own = [stage for stage in done.report.stages if stage.stage not in OWNERS]
        for stage in own:
            told = {name for name, value in stage.model_dump().items() if value is not None}
            assert not {name for name in told if name.startswith("cloud_")} | told & {"up_bytes", "down_bytes"}


def test_what_each_step_spent_adds_up_to_the_whole(done: Done) -> None:
    sums: dict[str, Counter[str]] = {}
    for line in done.lines:
        figures = {name: value for name, value in line.items() if name.endswith(("_bytes", "_flops", "_s", "_trips"))}
        sums.setdefault(line["phase"], Counter()).update({n: v for n, v in figures.items() if "_peak_" not in n})
    for stage in done.report.stages:
        if stage.stage in OWNERS:
            continue
        for name, value in stage.model_dump(exclude={"stage", "seconds", "steps", "stored_bytes"}).items():
            if value is not None and "_peak_" not in name:
                assert sums[stage.stage][name] == pytest.approx(value, rel=1e-9), (stage.stage, name)
    steps = [line["step"] for line in done.lines if line["phase"] == "train" and "real_tokens" in line]
    assert steps == list(range(1, STEPS + 1)), "one line for each step"


def test_the_peaks_of_phases_are_on_their_lines_and_the_greatest_is_the_runs(done: Done) -> None:
    for kind in ("tensor", "memory"):
        name = f"edge_peak_{kind}_bytes"
        own = {stage.stage: getattr(stage, name) for stage in done.report.stages if stage.stage not in OWNERS}
        written = {phase: max(line.get(name, 0) for line in done.lines if line["phase"] == phase) for phase in own}
        assert written == {phase: value or 0 for phase, value in own.items()}
        assert max(written.values()) == getattr(done.report.cost.edge, f"peak_{kind}_bytes")
    assert (done.stage("train").edge_peak_tensor_bytes or 0) > (done.stage("eval").edge_peak_tensor_bytes or 0)


def test_a_steps_lines_are_few(done: Done) -> None:
    written = Counter(line["step"] for line in done.lines if 0 < line["step"] < STEPS)
    assert set(written.values()) <= {1, 2}, "of training, and of a side that had something late"


def test_what_crossed_at_ports_belongs_to_blocks(done: Done) -> None:
    if done.method == "parameters":
        assert done.report.ports is not None
        assert {port.trained_steps for port in done.report.ports.ports} == {STEPS}
        assert all(block.round_trips == 0 for block in done.report.ports.blocks)
        return
    if done.method != "dlora":
        assert done.report.ports is None
        assert not any("places" in line for line in done.lines)
        return
    assert done.report.ports is not None
    spent = Counter[tuple[str, str]]()
    for line in done.lines:
        if line["phase"] == "train":
            spent.update({(at, name): value for at, own in line["places"].items() for name, value in own.items()})
    for block in done.report.ports.blocks:
        for name in ("up_bytes", "down_bytes", "round_trips"):
            assert spent[str(block.block), name] == getattr(block, name) > 0
        assert spent[str(block.block), "edge_forward_s"] > 0
        assert spent[str(block.block), "edge_backward_s"] > 0
    wire, blocks = done.report.cost.wire, done.report.ports.blocks
    calls = 2 * 2 * STEPS  # a forward and a backward of each of two microbatches
    assert wire.round_trips == calls + sum(block.round_trips for block in blocks)
    assert sum(block.up_bytes for block in blocks) < wire.up_bytes
    flops = sum(port.edge_forward_flops for port in done.report.ports.ports)
    assert 0 < flops < (done.report.cost.edge.forward_flops or 0)


def test_what_the_owner_spent_comes_with_the_emulator(done: Done) -> None:
    told = {stage.stage: stage for stage in done.report.stages if stage.stage in OWNERS}
    assert set(told) == (set(OWNERS) if done.method == "offsite" else set())
    for name, stage in told.items():
        assert not missing(stage, OWNERS[name]), name
        assert (stage.cloud_forward_flops or 0) > 0
    if told:
        assert told["distil"].steps == STEPS
        assert told["distil"].cloud_backward_flops
        assert told["build"].stored_bytes == done.report.offsite.bundle_bytes  # type: ignore[union-attr]
