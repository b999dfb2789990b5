"""The command line of what runs cost: `edge_client report`.

Knows formats and where they go; what stands in them is made elsewhere.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edge_client.terminal import quiet, show, width
from isthmus.errors import RunError, UsageError
from isthmus.ledger import told as told_by
from isthmus.ledger.told import Told
from isthmus.report import evaluated, render
from isthmus.report.history import History
from isthmus.report.schema import FILE_NAME, RunReport

app = typer.Typer()

FORMATS = ("table", "json", "md", "html", "tensorboard")


@dataclass(frozen=True)
class _Named:
    """Runs by their names, and where they are."""

    paths: Mapping[str, Path]
    reports: Mapping[str, RunReport]
    evaluations: render.Evaluations

    @classmethod
    def read(cls, paths: list[Path], costs: list[Path]) -> "_Named":
        named = {_label(path, paths): path for path in paths}
        reports = {name: report_of(path) for name, path in named.items()}
        told = tuple(_told(path) for path in costs)
        return cls(named, reports, {name: replace(evaluated.read(path), told=told) for name, path in named.items()})

    @property
    def histories(self) -> dict[str, History]:
        """What their directories tell step by step; of a `run.json` alone nothing."""
        return {name: History.read(path) if path.is_dir() else History() for name, path in self.paths.items()}


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="directories of runs")],
    form: Annotated[str, typer.Option("--format", help="table, json, md, html or tensorboard")] = "table",
    costs: Annotated[
        list[Path] | None, typer.Option(help="what the model's owner spent: a .costs.jsonl of theirs; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write there instead of to the terminal")] = None,
) -> None:
    """Show what runs cost each side, and how good they became; of a run that was killed, what it had cost until then.

    html is one page with plots that needs no network, and tensorboard a folder of event files; both need
    pip install 'isthmus[report]'.

    Each stage stands on a line of its own. What the owner of an emulator spent on it comes with the emulator, if it is
    told; what plugging an adapter in cost the owner is in the file that --costs names.

    Of a run of --method offsite also what plugging it in gained, beside the runs on the true span that are named.

    Example: edge_client report runs/first runs/second --format html --out costs.html
    """
    if form not in FORMATS:
        raise UsageError(f"no format {form!r}; use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    named = _Named.read(runs, costs or [])
    if form == "tensorboard":
        _export(named, out)
        return
    text = _text(named, form)
    if out is None:
        if form == "html" and sys.stdout.isatty():
            raise UsageError("--format html makes a page for a browser; give --out FILE")
        typer.echo(text.rstrip())
        return
    try:
        out.write_text(text.rstrip() + "\n")
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another --out") from None


def report_of(path: Path) -> RunReport:
    """The report of a run's directory, or of a `run.json`; where a killed run left none, what its files tell.

    Raises:
        RunError: there is no run, or its files cannot be read.
    """
    left = RunReport.load(path) if not path.is_dir() or (path / FILE_NAME).exists() else None
    if left is not None and (left.status == "complete" or not path.is_dir()):
        return left
    history = History.read(path)
    if left is not None and not history.goes_beyond(left):
        return left
    if not (path / "config.yaml").is_file():
        if left is None:
            raise RunError(f"{path} holds no run; check the path, or start one with `edge_client train`")
        return left
    with quiet():
        from edge_client.unreported import unreported

        return unreported(path, history, left)


def _text(named: _Named, form: str) -> str:
    if form == "md":
        return render.markdown(named.reports, named.evaluations)
    if form == "json":
        return render.as_json(named.reports, named.evaluations)
    if form == "html":
        from isthmus.report.page import page

        return page(named.reports, named.histories, named.evaluations)
    console = Console(width=width())
    with console.capture() as captured:
        show(dict(named.reports), named.evaluations, console)
    return captured.get()


def _export(named: _Named, out: Path | None) -> None:
    if out is None:
        raise UsageError("--format tensorboard writes event files into a folder; give --out DIR")
    with quiet():
        from isthmus.report.event_files import export

        export(out, named.reports, named.histories, named.evaluations)
    typer.echo(f"written; look at it with: tensorboard --logdir {out}")


def _told(path: Path) -> Told:
    found = told_by.read(path)
    if found is None:
        raise UsageError(f"{path} does not exist; `cloud_node plug-in` writes one beside the model's folder")
    return found


def _label(path: Path, runs: list[Path]) -> str:
    """The directory's name, or the whole path where two runs share it."""
    name = path.absolute().name
    return name if sum(other.absolute().name == name for other in runs) == 1 else str(path)
