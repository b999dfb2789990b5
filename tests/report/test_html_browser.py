"""The page as a person sees it, in a headless Chromium: plots drawn, fit for desk and phone, alone with itself."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.report.fields.score import Evaluation, Score
from isthmus.report.history import History
from isthmus.report.interval import wilson
from isthmus.report.page import page
from isthmus.report.schema import RunReport
from tests.faults.training import run_here, settings
from tests.harness import Server
from tests.kill_revive.conftest import KILLING
from tests.report.by_hand import write_steps
from tests.report.example import costing, dlora, report
from tests.report.offsite_example import HELD_OUT
from tests.watching.browser import Browser, browsing

PHONE, DESKTOP = 390, 1280
STRANGE = "<img src=x onerror=alert(1)>--ink-and-a-name-that-is-much-longer-than-any-legend-has-room-for"
TOO_WIDE = """[...document.querySelectorAll("body *")]
    .filter((each) => !each.closest("svg svg, clipPath, defs") && each.getBoundingClientRect().right > innerWidth + 0.5)
    .map((each) => each.outerHTML.slice(0, 120))"""
LISTEN = """window.said = [];
for (const kind of ["log", "info", "warn", "error"]) console[kind] = (...words) => window.said.push(words.join(" "));
addEventListener("securitypolicyviolation", (event) => window.said.push(event.violatedDirective + event.blockedURI));
addEventListener("error", (event) => window.said.push(event.message));
addEventListener("unhandledrejection", (event) => window.said.push(String(event.reason)));"""

Show = Callable[..., Browser]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as opened:
        opened.ask("Page.addScriptToEvaluateOnNewDocument", source=LISTEN)
        yield opened


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Show:
    """Write a page and open it, until its plots are drawn."""

    def go(reports: dict[str, RunReport], histories: dict[str, History], width: int, dark: bool = False) -> Browser:
        file = tmp_path / "page.html"
        file.write_text(page(reports, histories, {}))
        browser.complaints.clear()
        browser.open(file.as_uri(), width, dark=dark)
        browser.until("document.documentElement.dataset.drawn === 'yes'")
        return browser

    return go


def costly(correct: int, up: int, **changed: Any) -> RunReport:
    """A run with an accuracy on a thousand rows and its bytes."""
    score = Score(
        loss=1 - correct / 1000, accuracy=correct / 1000, correct=correct, accuracy_interval=wilson(correct, 1000)
    )
    run = report(eval=Evaluation(rows=1000, before=score, after=score), eval_data=HELD_OUT, **changed)
    return costing(run, wire={"up_bytes": up, "down_bytes": up, "round_trips": 200})


def several(place: Path) -> tuple[dict[str, RunReport], dict[str, History]]:
    """Five runs, two of them dominated, and a reference."""
    runs = {
        "cheap": costly(800, 2_000_000),
        "best": costly(880, 90_000_000),
        "waste": costly(850, 400_000_000),
        STRANGE: costly(790, 3_000_000),
        "whole": costly(890, 0, method="local"),
    }
    write_steps(place / "steps", 25)
    return runs, dict.fromkeys(runs, History.read(place / "steps"))


def one(place: Path) -> tuple[dict[str, RunReport], dict[str, History]]:
    """A run with every kind of plot."""
    write_steps(place / "steps", 60)
    return {"first": dlora({20: (0, 1), 40: (2,)}, steps=60)}, {"first": History.read(place / "steps")}


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("runs", [one, several])
def test_it_fits_the_screen_and_complains_of_nothing(
    show: Show, tmp_path: Path, width: int, dark: bool, runs: Callable[[Path], Any]
) -> None:
    shown = show(*runs(tmp_path), width, dark)
    shown.read("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    shown.until("[...document.querySelectorAll('.plot')].every((each) => each.querySelector('.main-svg'))")
    assert shown.read("innerWidth") == width
    assert shown.read("document.documentElement.scrollWidth") <= width
    assert shown.read(TOO_WIDE) == []
    assert shown.read("window.said") == []
    assert shown.complaints == []
    paper = shown.read("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(paper) < 80) == dark


@pytest.mark.parametrize("runs", [one, several])
def test_it_asks_nobody_for_anything(show: Show, tmp_path: Path, runs: Callable[[Path], Any]) -> None:
    shown = show(*runs(tmp_path), DESKTOP)
    asked = shown.read("performance.getEntriesByType('resource').map((each) => each.name)")
    assert [each for each in asked if not each.startswith("data:")] == []
    assert shown.read("document.querySelectorAll('script[src], link[href^=http], iframe, img').length") == 0
    shown.read(
        "fetch('https://example.com').catch(() => 0); const made = new Image(); made.src = 'https://example.com/x';"
    )
    shown.until("window.said.filter((each) => each.includes('example.com')).length >= 2")


def test_every_plot_of_a_run_is_drawn_with_its_data(show: Show, tmp_path: Path) -> None:
    shown = show(*one(tmp_path), DESKTOP)

    def count(key: str, what: str) -> Any:
        return shown.read(f"document.querySelectorAll('[data-plot={key}] {what}').length")

    assert shown.read("document.querySelectorAll('.plot').length") == 10
    assert count("loss-step", ".scatterlayer path.js-line") == 2  # each step's, and smoothed
    assert count("loss-step", ".scatterlayer path.point") == 2
    assert count("accuracy-step", ".scatterlayer path.point") == 2
    assert count("run-0-bytes", ".barlayer .point path") == 2 * 4
    assert count("run-0-flops", ".barlayer .point path") == 5
    assert count("run-0-step", ".barlayer .point path") == 7 + 4
    assert count("run-0-ports", ".heatmaplayer image") == 1
    assert count("run-0-ports", ".yaxislayer-above text") == 4


def test_a_line_falls_where_the_loss_does(show: Show, tmp_path: Path) -> None:
    shown = show(*one(tmp_path), DESKTOP)
    path = shown.read("document.querySelectorAll('[data-plot=loss-step] path.js-line')[1].getAttribute('d')")
    heights = [float(pair.split(",")[1]) for pair in path.lstrip("M").split("L")]
    assert heights == sorted(heights)  # down the screen


def test_the_dominated_are_grey_in_the_picture_and_in_the_table(show: Show, tmp_path: Path) -> None:
    shown = show(*several(tmp_path), DESKTOP)
    grey = shown.read(
        "(() => { const made = document.createElement('i'); made.style.color = 'var(--greyed)';"
        " document.body.append(made); const found = getComputedStyle(made).color; made.remove(); return found; })()"
    )
    names = shown.read(
        "[...document.querySelectorAll('[data-plot=front-0-0] .textpoint text')]"
        ".map((each) => [each.textContent, getComputedStyle(each).fill])"
    )
    greyed = {name[:8] for name, colour in names if colour == grey}
    assert len(names) == 5
    assert greyed == {"waste", "<img src"}
    marks = shown.read(
        "[...document.querySelectorAll('[data-plot=front-0-0] path.point')].map((each) => getComputedStyle(each).fill)"
    )
    assert marks.count(grey) == 2
    rows = shown.read(
        "[...document.querySelectorAll('.front tbody tr')]"
        ".map((row) => [row.cells[0].innerText, row.cells[5].innerText])"
    )
    assert {name: said for name, said in rows if "in bytes" in said}.keys() == {"waste", STRANGE}
    assert "in bytes: best" in dict(rows)["waste"]


def test_what_is_folded_is_drawn_when_it_is_opened(show: Show, tmp_path: Path) -> None:
    shown = show(*several(tmp_path), DESKTOP)
    assert shown.read("document.querySelectorAll('details[open]').length") == 0
    assert not shown.read("document.querySelector('[data-plot=run-1-bytes] .main-svg')")
    shown.read("document.querySelectorAll('summary')[1].click()")
    shown.until("document.querySelector('[data-plot=run-1-bytes] .barlayer .point path') !== null")


def test_names_are_text_in_plots_too(show: Show, tmp_path: Path) -> None:
    shown = show(*several(tmp_path), DESKTOP)
    assert shown.read("document.images.length") == 0
    labels = shown.read("[...document.querySelectorAll('.textpoint text')].map((each) => each.textContent)")
    assert [each for each in labels if each.startswith("<img src")]
    assert shown.read("document.querySelectorAll('.names li')[3].innerText") == STRANGE


def test_the_page_of_a_real_run_is_drawn(
    show: Show, servers: dict[str, Server], rows: Path, tmp_path: Path, cache: Path
) -> None:
    out = tmp_path / "run"
    run = run_here(settings(servers["llama"], rows, eval_data=rows, **{**KILLING, "steps": 12}), out)
    shown = show({"run": run}, {"run": History.read(out)}, PHONE)
    assert shown.read(TOO_WIDE) == []
    assert shown.read("window.said") == []
    drawn = shown.read(
        "[...document.querySelectorAll('.plot')].map((each) => each.querySelector('.main-svg') !== null)"
    )
    assert drawn == [True] * 10
    assert "complete" in shown.text("state")
