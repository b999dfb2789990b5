"""The command line that looks for what stands between an edge and a server: `edge_client doctor`.

Knows flags and what to print; everything else is called.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from edge_client.terminal import console_of_progress, quiet
from isthmus import command

app = typer.Typer()

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
SLOW_S = 2.0
"""A check that takes longer is named while it runs."""


@app.command("doctor")
def doctor_command(
    server: Annotated[str, typer.Option(help="HOST:PORT of the cloud node")],
    certs: Annotated[Path | None, typer.Option(help="folder of this edge's certificate")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plaintext to another machine")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Find out why a server cannot be used, or how well it can: each check with its remedy.

    Sends requests of random numbers, 4 MiB at most and 12 MB together, through a session that is closed in the end.
    The exit code is 0 if nothing failed, else that of the first failure.

    Example: edge_client doctor --server 127.0.0.1:7070 --certs certs/edge-a
    """
    with quiet(), command.importing():
        from edge_client.doctor import CHECKS, examine, exit_code
        from edge_client.doctor import as_json as in_json
        from edge_client.examined import Patient

    slow, out = console_of_progress(), Console(highlight=False, soft_wrap=True)
    patient = Patient(server, certs, insecure, command.cache_directory(), lambda words: slow.print(f"... {words}"))
    findings, width = [], max(len(check.name) for check in CHECKS)
    looking = examine(patient)
    for check in CHECKS:
        with _named_if_slow(check.name, slow):
            found = next(looking)
        findings.append(found)
        if not as_json:
            out.print(
                Text(f"{found.outcome}  ", STYLES[found.outcome]), f"{found.check:<{width}}  {found.says}", sep=""
            )
    looking.close()
    if as_json:
        typer.echo(json.dumps(in_json(patient, findings)))
    if code := exit_code(findings):
        raise typer.Exit(code)


@contextmanager
def _named_if_slow(check: str, console: Console) -> Iterator[None]:
    timer = threading.Timer(SLOW_S, lambda: console.print(f"... {check}"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
