"""One page of HTML about runs: everything in one file, which asks nobody for anything.

Knows where plots and tables stand and how a page is kept from the network; computes no figure and draws no plot.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from isthmus.errors import UsageError
from isthmus.report import offsite, six_rows, stage_table
from isthmus.report.curves import curve, scored
from isthmus.report.evaluated import Kept
from isthmus.report.front_plots import front_plots
from isthmus.report.front_table import front_grid
from isthmus.report.fronts import bundle_bytes, groups
from isthmus.report.grid import Grid, plain_grid
from isthmus.report.history import History
from isthmus.report.learning_plots import Learned, learning_plots
from isthmus.report.plot import Plot, series_colour, series_line
from isthmus.report.run_plots import run_plots
from isthmus.report.schema import RunReport
from isthmus.report.sections import sections
from isthmus.report.tiles import Tile, about, state_of, tiles

_HERE: Final = Path(__file__).parent
_BORDERS: Final = {"solid": "solid", "dash": "dashed", "dot": "dotted"}
_NO_STEPS: Final = "Its directory has no metrics.jsonl and ledger.jsonl, so nothing can be said of single steps."


@dataclass(frozen=True)
class _Run:
    """A run's own part of the page."""

    name: str
    about: str
    plots: Sequence[Plot]
    missing: str
    colour: str
    line: str


@dataclass(frozen=True)
class _Field:
    """Runs that were scored on the same rows."""

    heading: str
    plots: Sequence[Plot]
    grid: Grid
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class _Section:
    title: str
    grid: Grid


def page(reports: Mapping[str, RunReport], histories: Mapping[str, History], kept: Mapping[str, Kept]) -> str:
    """The page of named runs: with more than one, what each is worth beside the others comes first.

    Args:
        reports: by name, in the order in which they are shown; at least one.
        histories: what their directories tell step by step, by the same names.
        kept: what their directories have beside that, by the same names.

    Raises:
        UsageError: plotly is not installed.
    """
    library, script = _plotly(), (_HERE / "page.js").read_text()
    fields = _fields(reports, kept) if len(reports) > 1 else []
    learning = learning_plots(_learned(reports, histories, kept))
    runs = [_run(number, name, run, histories[name]) for number, (name, run) in enumerate(reports.items())]
    parts = [learning, *(field.plots for field in fields), *(run.plots for run in runs)]
    made: str = _template().render(
        policy=_policy(library, script),
        title=next(iter(reports)) if len(reports) == 1 else f"{len(reports)} runs",
        state=state_of(tuple(reports.values())),
        about=runs[0].about if len(runs) == 1 else "",
        tiles=_tiles(reports, histories),
        fields=fields,
        learning=learning,
        runs=runs,
        stages=_stages(reports, kept),
        offsite=[_offsite(made) for made in offsite.tables(reports, kept)],
        sections=_sections(reports),
        stages_legend=stage_table.LEGEND,
        plots=_data({plot.key: plot.figure() for part in parts for plot in part}),
        plotly=Markup(library),  # noqa: S704 - the library's and the page's own script, whose hashes the policy names
        script=Markup(script),  # noqa: S704
    )
    return made


def _run(number: int, name: str, run: RunReport, history: History) -> _Run:
    plots, told = run_plots(f"run-{number}", run, history), _NO_STEPS if history == History() else history.missing(run)
    return _Run(name, about(run), plots, told, series_colour(number), _BORDERS[series_line(number)])


def _fields(reports: Mapping[str, RunReport], kept: Mapping[str, Kept]) -> list[_Field]:
    found = [group for group in groups(reports, kept) if group.fronts]
    names = list(reports)
    return [
        _Field(
            "What each cost, and how good it became"
            + (f": rows {number + 1} of {len(found)}" if len(found) > 1 else ""),
            front_plots(f"front-{number}", group, names),
            front_grid(group),
            group.left_out,
        )
        for number, group in enumerate(found)
    ]


def _learned(
    reports: Mapping[str, RunReport], histories: Mapping[str, History], kept: Mapping[str, Kept]
) -> dict[str, Learned]:
    plugged = {made.name: made.plugged_in.score for made in offsite.tables(reports, kept)}
    return {
        name: Learned(
            curve(run, histories[name]),
            scored(run, histories[name], plugged.get(name)),
            bool(run.cost.wire.up_bytes or run.cost.wire.down_bytes or bundle_bytes(run)),
        )
        for name, run in reports.items()
    }


def _tiles(reports: Mapping[str, RunReport], histories: Mapping[str, History]) -> Sequence[Tile]:
    if len(reports) > 1:
        return ()
    name, run = next(iter(reports.items()))
    return tiles(run, histories[name])


def _sections(reports: Mapping[str, RunReport]) -> list[_Section]:
    runs, heads = tuple(reports.values()), ("", *reports) if len(reports) > 1 else ("", "")
    return [
        _Section(
            section.title,
            plain_grid(heads, [(row.label, *row.cells) for row in section.rows]),
        )
        for section in sections(runs)
    ]


def _stages(reports: Mapping[str, RunReport], kept: Mapping[str, Kept]) -> list[_Section]:
    grids = {name: stage_table.grid(made) for name, made in stage_table.tables(reports, kept).items()}
    return [_Section(name, plain_grid(made.heads, made.rows)) for name, made in grids.items()]


def _offsite(made: offsite.Table) -> dict[str, Any]:
    told = six_rows.told(made)
    grids = [(said, plain_grid(grid.heads, grid.rows)) for said, grid in told.grids]
    return {"heading": told.heading, "grids": grids, "below": told.below}


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def _plotly() -> str:
    """The library's JavaScript.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError("--format html needs plotly; install it with: pip install 'isthmus[report]'") from None
    return str(get_plotlyjs())


def _policy(*scripts: str) -> str:
    """A policy (CSP Level 3) that runs these scripts alone and lets nothing be loaded or sent.

    Styles may stand in the page, since plots are made of them, and images in data: URLs, since maps are.
    """
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _data(plots: Mapping[str, Any]) -> Markup:
    """JSON that no text in it can end."""
    text = json.dumps(plots, separators=(",", ":"), allow_nan=False)
    escaped = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup(escaped)  # noqa: S704 - JSON without a "<" cannot close its element
