"""A run's report, or several side by side, for people: a terminal table or Markdown; and exact, as JSON.

Knows where the sections, charts and tables of a report stand; what is in them is made elsewhere.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from rich.console import Group
from rich.table import Table
from rich.text import Text

from isthmus.report import offsite, ports, six_rows, stage_table
from isthmus.report.evaluated import Kept
from isthmus.report.gains import in_words
from isthmus.report.schema import RunReport
from isthmus.report.sections import sections
from isthmus.report.units import NONE

Evaluations: TypeAlias = Mapping[str, Kept]
"""What runs' directories have beside the reports, by the runs' names."""

_NOT_EVALUATED: Final[Evaluations] = MappingProxyType({})


def table(reports: Mapping[str, RunReport]) -> Table:
    """A table for the terminal, one column for each named run; two runs fit 100 columns."""
    drawn = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
    drawn.add_column("", no_wrap=True)
    for name in reports:
        drawn.add_column(Text(name), justify="right", overflow="fold")
    for section in sections(tuple(reports.values())):
        drawn.add_row()
        drawn.add_row(Text(section.title, style="bold cyan"))
        for row in section.rows:
            drawn.add_row(Text(f"  {row.label}"), *(Text(cell, "dim" if cell == NONE else "") for cell in row.cells))
    return drawn


def charts(reports: Mapping[str, RunReport]) -> list[Text]:
    """For the terminal, after the table: which ports were alive when, of each named run that has any."""
    return [Text.assemble("\n", (name, "bold"), "\n", chart, no_wrap=True) for name, chart in _charts(reports)]


def offsite_tables(reports: Mapping[str, RunReport], evaluations: Evaluations) -> list[Group]:
    """For the terminal, after the charts: how each run on an emulator did between not tuning and the true span."""
    return [six_rows.drawn(made) for made in offsite.tables(reports, evaluations)]


def stage_tables(reports: Mapping[str, RunReport], evaluations: Evaluations) -> list[Group]:
    """For the terminal, after the charts: every stage of each run that tells them."""
    return [
        Group(
            Text.assemble("\n", (name, "bold"), ", stage by stage\n"),
            stage_table.grid(made).drawn(),
            Text(f"\n{stage_table.LEGEND}", "dim"),
        )
        for name, made in stage_table.tables(reports, evaluations).items()
    ]


def markdown(reports: Mapping[str, RunReport], evaluations: Evaluations = _NOT_EVALUATED) -> str:
    """The same rows as Markdown: one table a section, one column for each named run; the charts; runs on emulators."""
    names = [name.replace("|", "\\|").replace("\n", " ") for name in reports]
    lines: list[str] = []
    for section in sections(tuple(reports.values())):
        lines += [f"### {section.title}", "", f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
        for row in section.rows:
            cells = (" ".join(cell.replace("|", "\\|").split()) for cell in row.cells)
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
        lines.append("")
    for name, chart in _charts(reports):
        lines += ["### Ports: " + name.replace("\n", " "), "", "```text", chart.plain, "```", ""]
    for name, stages in stage_table.tables(reports, evaluations).items():
        lines += ["### Stages: " + name.replace("\n", " "), "", *stage_table.grid(stages).markdown(), ""]
        lines += [stage_table.LEGEND, ""]
    for made in offsite.tables(reports, evaluations):
        lines += six_rows.markdown(made)
    return "\n".join(lines)


def as_json(reports: Mapping[str, RunReport], evaluations: Evaluations = _NOT_EVALUATED) -> str:
    """Exact figures: one run as its `run.json`, several as an object from name to that.

    Beside them, where a run was tuned on an emulator, `offsite_tables`: from such runs' names to their rows and words.
    Where runs tell their stages, `stage_tables`: from their names to every stage, those beside the run included.
    """
    exact = {name: report.model_dump(mode="json") for name, report in reports.items()}
    shown = next(iter(exact.values())) if len(exact) == 1 else exact
    made = offsite.tables(reports, evaluations)
    if made:
        shown |= {"offsite_tables": {table.name: {**table.as_dict(), "words": in_words(table)} for table in made}}
    stages = stage_table.tables(reports, evaluations)
    if stages:
        shown |= {"stage_tables": {name: [line.as_dict() for line in lines] for name, lines in stages.items()}}
    return json.dumps(shown, indent=2)


def _charts(reports: Mapping[str, RunReport]) -> list[tuple[str, Text]]:
    drawn = ((name, ports.ports_chart(report)) for name, report in reports.items())
    return [(name, chart) for name, chart in drawn if chart is not None]
