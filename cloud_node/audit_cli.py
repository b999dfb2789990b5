"""`cloud_node audit`: is a log as it was written, and who used what.

Knows flags and how figures are shown; the log is read by `audit_reading`.
"""

import csv
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from cloud_node import audit_reading
from cloud_node.audit_reading import COLUMNS, Used
from isthmus.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="Check an audit log, and export what each tenant used.")

File = Annotated[Path, typer.Argument(help="the file that `cloud_node serve --audit` writes")]
Json = Annotated[bool, typer.Option("--json", help="for a program")]


@app.command(epilog="Example: cloud_node audit verify audit.jsonl --expect 3f0c...")
def verify(
    file: File,
    expect: Annotated[str | None, typer.Option(help="a hash noted earlier, which a line must have")] = None,
    as_json: Json = False,
) -> None:
    """Check every line against the one before it."""
    count, end = audit_reading.verify(file, expect)
    if as_json:
        typer.echo(json.dumps({"lines": count, "newest": end.number, "hash": end.hash}))
        return
    typer.echo(f"{count:,} lines, each as it was written; the newest hash is {end.hash}")


@app.command(epilog="Example: cloud_node audit usage audit.jsonl --from 2026-11-01 --format csv > november.csv")
def usage(
    file: File,
    form: Annotated[Literal["table", "csv", "json"], typer.Option("--format", help="how it is shown")] = "table",
    since: Annotated[str | None, typer.Option("--from", help="day or time (UTC) from which on")] = None,
    until: Annotated[str | None, typer.Option("--to", help="day or time (UTC) before which")] = None,
) -> None:
    """What each tenant used: sessions opened and calls made in that time."""
    used = audit_reading.usage(file, _time(since, "--from"), _time(until, "--to"))
    if form == "json":
        typer.echo(json.dumps([asdict(each) for each in used]))
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, used))
    else:
        typer.echo(_table(used))


def _time(text: str | None, flag: str) -> datetime | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{flag} {text!r} is no time: give it as 2026-11-24 or 2026-11-24T08:00") from None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def _table(used: list[Used]) -> str:
    rows = [[_shown(value) for value in asdict(each).values()] for each in used]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    aligned = [
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in ([*COLUMNS], *rows))
    ]
    return "\n".join(line.rstrip() for line in aligned)


def _shown(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
