"""The page of one run or of several: everything in one file, true to the reports, and closed to the network."""

import base64
import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from isthmus.errors import RunError, UsageError
from isthmus.report.evaluated import Kept
from isthmus.report.fields.score import Evaluation, Score
from isthmus.report.history import History
from isthmus.report.page import page
from isthmus.report.schema import RunReport
from tests.faults.training import command_here, is_one_line
from tests.report.by_hand import DOWN, UP, loss_at, write_run, write_steps
from tests.report.example import costing, dlora, report
from tests.report.offsite_example import HELD_OUT, everything, kept
from tests.report.reading_pages import Page, painted

STRANGE = "</script><img src=x onerror=alert(1)>&amp;\"'--ink %{x} $x$"
NOTHING = Evaluation(rows=None, before=Score(loss=None, accuracy=None), after=Score(loss=None, accuracy=None))


def made(reports: dict[str, RunReport], histories: dict[str, History] | None = None, **kept: Kept) -> Page:
    empty = dict.fromkeys(reports, History())
    return Page(page(reports, empty | (histories or {}), kept))


def history(place: Path, steps: int = 25) -> History:
    write_steps(place, steps)
    return History.read(place)


def several() -> dict[str, RunReport]:
    """Runs of every kind, each with a name of its own."""
    return {
        "split": report(eval_data=HELD_OUT),
        "dlora": dlora({20: (0, 1), 40: (2,)}),
        "failed": report(status="failed", eval=NOTHING),
        STRANGE: report(method="local", eval_data=HELD_OUT),
    }


def test_it_holds_all_that_it_needs_and_its_policy_lets_nothing_else_in(tmp_path: Path) -> None:
    shown = made({"run": report()}, {"run": history(tmp_path)})
    scripts = [text for attributes, text in shown.scripts if "type" not in attributes]
    assert [text == get_plotlyjs() for text in scripts] == [True, False]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert shown.policy == {
        "default-src": ["'none'"],
        "script-src": [f"'sha256-{each}'" for each in hashes],
        "style-src": ["'unsafe-inline'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    asked = {(tag, given[name]) for tag, given in shown.elements for name in ("src", "href", "action") if name in given}
    assert asked == {("link", "data:,")}


def test_the_policy_stands_before_whatever_it_is_about() -> None:
    tags = [
        tag
        for tag, given in made({"run": report()}).elements
        if tag in ("style", "script", "link") or "http-equiv" in given
    ]
    assert tags[0] == "meta"


FIGURES = [
    *("80.1 %", "87.4 %", "+7.3", "0.4815", "0.3127", "170.20 MB", "83.90 MB", "84.10 MB", "0.34 %", "1.50 MB", "240"),
    *("3.12 TFLOP", "5.77 TFLOP", "49.00 GFLOP", "61.25 s", "114.30 s", "258.04 s", "312.00 MB", "4,718,592", "36,450"),
]


@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_of_the_tables_stands_in_it(figure: str) -> None:
    assert figure in made({"run": report()}).text


def test_the_first_figures_are_quality_bytes_time_and_memory(tmp_path: Path) -> None:
    text = made({"run": report()}, {"run": history(tmp_path)}).text
    for words in (
        "Accuracy 87.4 % 80.1 % before",
        "Crossed in training 168 MB",
        "Median step 0.60 s",
        "Edge memory, peak 911 MB",
    ):
        assert words in text


def test_bars_are_the_reports_own_figures() -> None:
    run = report()
    plots = made({"run": run}).plots

    def bars(key: str) -> dict[tuple[str, str], float]:
        return {
            (label, trace["name"]): value
            for trace in plots[f"run-0-{key}"]["data"]
            for label, value in zip(trace["y"], trace["x"], strict=True)
        }

    phases = {"Fetching": "fetch", "Training": "train", "Evaluating": "eval", "Control": "control"}
    traffic = {label: getattr(run.cost.wire.by_phase, phase) for label, phase in phases.items()}
    ways = {"edge to cloud": "up_bytes", "cloud to edge": "down_bytes"}
    assert bars("bytes") == {
        (label, way): getattr(crossed, figure) for label, crossed in traffic.items() for way, figure in ways.items()
    }
    flops = {label: value for (label, name), value in bars("flops").items() if name != "run again"}
    assert flops == {
        "Edge forward": 3_120_000_000_000,
        "Edge backward": 4_560_000_000_000,
        "Cloud forward": 5_890_000_000_000 - 49_000_000_000,
        "Cloud backward": 5_770_000_000_000,
    }
    assert bars("flops")["Cloud forward", "run again"] == 49_000_000_000
    assert sum(bars("seconds").values()) == pytest.approx(61.25 + 82.5 + 114.3 + 48.5 + 51.75 + 0.5)
    assert set(bars("memory").values()) == {312_000_000, 911_000_000, 420_000_000}


def test_lines_are_the_losses_over_steps_and_over_bytes(tmp_path: Path) -> None:
    plots = made({"run": report()}, {"run": history(tmp_path, 5)}).plots
    (training,) = (trace for trace in plots["loss-step"]["data"] if trace["name"] == "training")
    assert (training["x"], training["y"]) == ([1, 2, 3, 4, 5], [loss_at(step) for step in range(1, 6)])
    (over,) = (trace for trace in plots["loss-crossed"]["data"] if trace["name"] == "training")
    assert over["x"] == [sum(UP + DOWN + 20 * each for each in range(step)) for step in range(1, 6)]
    (scored,) = (trace for trace in plots["accuracy-crossed"]["data"])
    assert (scored["x"], scored["y"]) == ([0, 168_000_000], pytest.approx([80.1, 87.4]))


def test_plotly_itself_finds_nothing_wrong_with_any_plot(tmp_path: Path) -> None:
    runs = several() | everything()
    plots = made(runs, {"dlora": history(tmp_path, 60)}, **kept(everything())).plots
    kinds = {key.split("-", 2 if key.startswith("run") else 1)[-1] for key in plots}
    assert kinds >= {"bytes", "flops", "seconds", "memory", "step", "ports", "crossed", "0-0", "0-1", "0-2"}
    for figure in plots.values():
        go.Figure(painted(figure))


def test_every_plot_has_its_place_and_every_place_its_plot(tmp_path: Path) -> None:
    shown = made(several(), {"dlora": history(tmp_path)})
    places = [given["data-plot"] for _, given in shown.elements if "data-plot" in given]
    assert sorted(filter(None, places)) == sorted(shown.plots)


def test_names_of_strangers_are_text_wherever_they_stand() -> None:
    shown = made(several())
    assert [tag for tag, _ in shown.elements if tag == "img"] == []
    assert STRANGE in shown.text
    assert len(shown.scripts) == 3
    alone = made({STRANGE: report(model="<b>m</b>", cut="2:2")})
    assert "<b>m</b>" in alone.text
    in_plots = json.dumps(alone.plots | shown.plots)
    assert "<img" not in in_plots
    assert "<b>" not in in_plots


def test_dominated_runs_are_grey_and_named_with_who_dominates_them() -> None:
    def costly(up: int, correct: int) -> RunReport:
        score = Score(loss=0.3, accuracy=correct / 100, correct=correct, accuracy_interval=(0.0, 1.0))
        run = report(eval=Evaluation(rows=100, before=score, after=score), eval_data=HELD_OUT)
        return costing(run, wire={"up_bytes": up, "down_bytes": 0})

    shown = made({"best": costly(100, 90), "waste": costly(900, 80), "cheap": costly(10, 70)})
    traces = {trace["name"]: trace for trace in shown.plots["front-0-0"]["data"]}
    assert traces["dominated"]["text"] == ["waste"]
    assert traces["dominated"]["marker"]["color"] == traces["dominated"]["textfont"]["color"] == "--greyed"
    assert {traces[name]["marker"]["color"] for name in ("best", "cheap")} == {"--series-0", "--series-2"}
    assert traces["front"]["x"] == [10, 100]
    assert "in bytes: best" in shown.text


def test_one_run_has_no_fronts_and_a_run_that_failed_says_so() -> None:
    shown = made({"run": report(status="failed", eval=NOTHING, final_loss=None)})
    assert not any(key.startswith("front") for key in shown.plots)
    assert "run failed split" in shown.text
    assert "no held-out rows were scored" in shown.text


def test_a_report_alone_says_that_its_steps_are_not_there() -> None:
    shown = made({"run": report()})
    assert "nothing can be said of single steps" in shown.text
    assert "run-0-step" not in shown.plots


def test_a_ledger_that_was_cut_off_is_said_to_be_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", report())
    whole = History.read(run)
    of_all = report().model_copy(update={"steps": max(whole.steps)})
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-2]))
    assert whole.missing(of_all) == ""
    assert "ledger.jsonl ends" in History.read(run).missing(of_all)


def test_the_tables_of_runs_on_emulators_and_their_words_are_in_it() -> None:
    runs = everything()
    text = made(runs, **kept(runs)).text
    for words in ("off, tuned on an emulator: rank, 26 blocks", "plugged in", "true span throughout", "160 MB"):
        assert words in text


def test_the_command_writes_the_page_of_the_runs_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, report(seed=seed)) for seed, name in enumerate(("one", "other"))]
    out = tmp_path / "costs.html"
    assert command_here(monkeypatch, capsys, "report", *runs, "--format", "html", "--out", out) == (0, "")
    shown = Page(out.read_text())
    assert {"loss-step", "run-0-step", "run-1-step"} <= set(shown.plots)
    assert "2 runs all complete" in shown.text


def refused(outcome: tuple[Any, str], error: type[Exception], *words: str) -> None:
    code, said = outcome
    assert code == error.exit_code  # type: ignore[attr-defined]
    assert is_one_line(said)
    assert all(word in said for word in words), said


def test_what_is_missing_is_said_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", report())
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for form in ("html", "tensorboard"):
        outcome = command_here(monkeypatch, capsys, "report", run, "--format", form, "--out", tmp_path / "out")
        refused(outcome, UsageError, f"--format {form}", "pip install 'isthmus[report]'")
    assert not (tmp_path / "out").exists()
    assert command_here(monkeypatch, capsys, "report", run)[0] == 0


def test_other_schemas_other_formats_and_places_that_cannot_be_written_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", report())

    def go(*flags: object) -> Any:
        return command_here(monkeypatch, capsys, "report", run, *map(str, flags))

    refused(go("--format", "pdf"), UsageError, "'pdf'", "html or tensorboard")
    refused(go("--format", "html", "--out", tmp_path), UsageError, "cannot be written")
    refused(go("--format", "tensorboard"), UsageError, "--out DIR")
    document = json.loads((run / "run.json").read_text()) | {"schema": "isthmus-run/0"}
    (run / "run.json").write_text(json.dumps(document))
    refused(go("--format", "html"), RunError, "isthmus-run/0", "isthmus-run/1")


PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


def test_the_core_alone_draws_no_plot_and_the_extra_does() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", each)[0] for each in requirements}

    assert not {"plotly", "tensorboard"} & names(PROJECT["project"]["dependencies"])
    assert names(PROJECT["project"]["optional-dependencies"]["report"]) == {"jinja2", "plotly", "tensorboard"}


@pytest.mark.parametrize("name", ["report/page.html", "report/page.js"])
def test_what_the_page_is_made_of_is_part_of_the_package(name: str) -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["isthmus"]
    assert any(Path(name).match(pattern) for pattern in patterns)
