"""Every stage stands on a line of its own, whoever did it, and of what nobody told a line says so."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge_client import owners_costs
from isthmus.ledger.record import Ledger
from isthmus.ledger.told import SCHEMA, Told
from isthmus.report import render, stage_table
from isthmus.report.evaluated import Kept, Submitted, note_submission, read
from isthmus.report.fields.stage import Stage
from isthmus.report.history import History
from isthmus.report.page import page
from isthmus.report.schema import RunReport
from isthmus.report.stages import stages_of, stages_told
from tests.report import offsite_example as example

ADAPTER, EMULATOR = "ad" * 32, "e5" * 32


def owners(of: str, *phases: Any) -> Told:
    ledger = Ledger()
    for number, phase in enumerate(phases, start=1):
        ledger.add(phase, cloud_forward_s=number, cloud_forward_flops=1000 * number, cloud_update_s=0.5)
        ledger.peak("cloud_peak_memory_bytes", 10**6 * number, phase)
    return Told(of, 12_345, ledger, {"distil": 40} if "distil" in phases else {})


def run(*, told: bool) -> RunReport:
    """Tuned on an emulator that was distilled and measured."""
    ledger = Ledger()
    ledger.add("fetch", up_bytes=10, down_bytes=20, edge_wait_s=0.5)
    ledger.add(
        "train", edge_forward_flops=3 * 10**9, edge_backward_flops=4 * 10**9, edge_forward_s=1, edge_backward_s=2
    )
    ledger.add("look", up_bytes=7, down_bytes=8, edge_forward_s=0.1, cloud_forward_s=0.25, cloud_forward_flops=500)
    ledger.peak("edge_peak_tensor_bytes", 9 * 10**6, "train")
    own = stages_of(ledger, {"train": {"steps": 30, "seconds": 3.25, "stored_bytes": 999}})
    before = stages_told(owners(EMULATOR, "build", "distil", "measure")) if told else ()
    base = example.offsite(example.EMULATED, example.TUNED)
    assert base.offsite is not None
    offsite = base.offsite.model_copy(update={"emulator": EMULATOR, "distilled_steps": 40, "gap": 0.5})
    return base.model_copy(update={"stages": (*before, *own), "offsite": offsite, "adapter": ADAPTER})


def shown(report: RunReport, kept: Kept, form: str) -> str:
    reports, beside = {"off": report}, {"off": kept}
    if form == "json":
        return render.as_json(reports, beside)
    if form == "md":
        return render.markdown(reports, beside)
    if form == "html":
        return page(reports, {"off": History()}, beside)
    console = Console(width=100)
    with console.capture() as captured:
        for part in render.stage_tables(reports, beside):
            console.print(part)
    return captured.get()


LABELS = ["Build", "Distil", "Measure", "Fetch and load", "Tune", "Look", "Plug in"]


@pytest.mark.parametrize("form", ["table", "md", "html"])
def test_each_stage_and_side_has_a_line(form: str) -> None:
    kept = Kept("off", told=(owners(ADAPTER, "plug-in", "score"),))
    text = shown(run(told=True), kept, form)
    for label in ("Build, cloud", "Distil, cloud", "Measure, cloud", "Fetch and load, edge", "Tune, edge"):
        assert text.count(label) == 1, label
    for label in ("Look, edge", "Look, cloud", "Plug in, cloud", "Score, plugged in, cloud"):
        assert text.count(label) == 1, label
    assert "not told" not in text
    assert "3.25" in text, "seconds of tuning"


def test_json_has_every_stage_with_exact_figures() -> None:
    made = json.loads(shown(run(told=True), Kept("off"), "json"))["stage_tables"]["off"]
    assert [line["label"] for line in made] == LABELS
    tuned = next(line for line in made if line["stage"] == "train")
    assert (tuned["edge_forward_flops"], tuned["edge_backward_flops"], tuned["steps"]) == (3 * 10**9, 4 * 10**9, 30)
    assert tuned["cloud_forward_flops"] is None
    assert [line["told"] for line in made] == [True] * 6 + [False]


@pytest.mark.parametrize("form", ["table", "md", "html", "json"])
def test_what_nobody_told_is_said_and_never_guessed(form: str) -> None:
    text = shown(run(told=False), Kept("off"), form)
    if form == "json":
        made = json.loads(text)["stage_tables"]["off"]
        assert [line for line in made if not line["told"]] == [
            {"stage": stage, "label": label, "told": False}
            for stage, label in (
                ("build", "Build"),
                ("distil", "Distil"),
                ("measure", "Measure"),
                ("plug-in", "Plug in"),
            )
        ]
        return
    for label in ("Build", "Distil", "Measure", "Plug in"):
        assert f"{label}, cloud: not told" in text


def test_a_stage_that_never_was_has_no_line() -> None:
    report = run(told=False)
    assert report.offsite is not None
    undistilled = report.offsite.model_copy(update={"distilled_steps": 0, "gap": None})
    made = stage_table.lines(report.model_copy(update={"offsite": undistilled}), None)
    assert not {line.stage for line in made} & {"distil", "measure"}


def test_costs_of_another_adapter_are_left_out() -> None:
    made = stage_table.lines(run(told=True), Kept("off", told=(owners("0" * 64, "plug-in"),)))
    assert [line.cost for line in made if line.stage == "plug-in"] == [None]


def test_handing_in_is_a_stage_of_the_run_whose_adapter_it_was(tmp_path: Path) -> None:
    cost = Stage(stage="submit", seconds=1.0, up_bytes=5, down_bytes=6, stored_bytes=4)
    for adapter in (ADAPTER, "0" * 64):
        note_submission(tmp_path, Submitted(bundle="b" * 64, adapter=adapter, cost=cost))
    made = stage_table.lines(run(told=True), read(tmp_path))
    assert [line.cost for line in made if line.stage == "submit"] == [cost]


def test_a_report_older_than_stages_has_no_such_table() -> None:
    old = run(told=True).model_copy(update={"stages": ()})
    assert stage_table.tables({"off": old}, {}) == {}
    assert "stage_tables" not in json.loads(render.as_json({"off": old}))


def test_an_edge_keeps_what_it_was_told_and_leaves_out_what_is_malformed_or_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    told = owners(EMULATOR, "build", "distil", "measure")
    for content in (b"", b"{", "\n".join(owners("0" * 64, "build").lines()).encode(), b"x" * (1 << 20)):
        owners_costs.keep(EMULATOR, content)
        assert owners_costs.kept(EMULATOR) is None
    owners_costs.keep(EMULATOR, "\n".join(told.lines()).encode())
    found = owners_costs.kept(EMULATOR)
    assert found is not None
    assert stages_told(found) == stages_told(told)
    assert json.loads((tmp_path / "costs" / f"{EMULATOR}.costs.jsonl").read_text().splitlines()[0])["schema"] == SCHEMA
