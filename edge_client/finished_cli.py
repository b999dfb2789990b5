"""The command line for runs that are done: `edge_client evaluate`, `generate`, `submit`; `report` has its own file.

Knows flags and what to print; everything else is called.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from edge_client import report_cli
from edge_client.shown import show_text
from edge_client.terminal import console_of_progress, quiet
from isthmus.command import importing
from isthmus.errors import UsageError
from isthmus.report.units import size

app = typer.Typer()

Span = Annotated[
    str | None, typer.Option(help="remote (over the wire), emulated, or local (needs --model) [the run's]")
]
AnyServer = Annotated[str | None, typer.Option(help="HOST:PORT [the run's]")]
AnyCerts = Annotated[Path | None, typer.Option(help="folder of this edge's certificate [the run's]")]
Insecure = Annotated[bool, typer.Option("--insecure", help="plaintext to another machine")]
Threads = Annotated[int | None, typer.Option(help="CPU threads [the run's]", min=1)]
SealKey = Annotated[
    Path | None, typer.Option("--key-file", help="opens what --seal sealed [ISTHMUS_PASSPHRASE, or asked for]")
]
WholeModel = Annotated[str | None, typer.Option(help="the whole model, for --span local")]


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Option(help="directory of a run")],
    data: Annotated[Path, typer.Option(help="rows to score, JSON Lines")],
    span: Span = None,
    server: AnyServer = None,
    certs: AnyCerts = None,
    insecure: Insecure = False,
    model: WholeModel = None,
    threads: Threads = None,
    key_file: SealKey = None,
    untouched: Annotated[bool, typer.Option("--untouched", help="score the model without the run's adapter")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Score a run's adapter on rows. With --span remote, hidden states of the rows are sent.

    A run of --method offsite is plugged in by --span remote: its adapter meets the true span.

    Example: edge_client evaluate --run runs/first --data held-out.jsonl --json
    """
    with quiet():
        with importing():
            from edge_client.finished import Using, evaluate

        using = Using(span_of(span), server, certs, model, untouched, insecure, threads, key_file)
        found = evaluate(run, data, using, console_of_progress())
    if as_json:
        typer.echo(json.dumps({**found.score.model_dump(), **found.model_dump(exclude={"score"})}))
        return
    typer.echo(f"{found.rows:,} rows: {found.score.in_words()}")
    fetched = f"; before it {size(found.fetched_bytes)} fetched" if found.fetched_bytes else ""
    typer.echo(f"{size(found.up_bytes)} up, {size(found.down_bytes)} down{fetched}")


@app.command("generate")
def generate_command(
    run: Annotated[Path, typer.Option(help="directory of a run")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="tokens to add at most")] = 64,
    span: Span = None,
    server: AnyServer = None,
    certs: AnyCerts = None,
    insecure: Insecure = False,
    model: WholeModel = None,
    threads: Threads = None,
    key_file: SealKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Continue a prompt with a run's adapter, greedily. With --span remote, hidden states of the text are sent.

    Example: edge_client generate --run runs/first --prompt "The film was"
    """
    with quiet():
        with importing():
            from edge_client.finished import Using, continue_prompt

        using = Using(span_of(span), server, certs, model, insecure=insecure, threads=threads, key_file=key_file)
        found = continue_prompt(run, prompt, new_tokens, using, console_of_progress())
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, **vars(found)}))
        return
    show_text(found.text + "\n")
    typer.echo(f"{size(found.up_bytes)} up, {size(found.down_bytes)} down")


@app.command("submit")
def submit_command(
    run: Annotated[Path, typer.Option(help="directory of a run that is done")],
    server: AnyServer = None,
    certs: AnyCerts = None,
    insecure: Insecure = False,
    key_file: SealKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Hand a run's adapter to the model owner, signed: its values, which were fitted to the data, leave this machine.

    Example: edge_client submit --run runs/offsite --server 127.0.0.1:7070 --certs certs/edge-a
    """
    with quiet():
        from edge_client.submitting import submit

        receipt = submit(run, server, certs, insecure, console_of_progress(), key_file)
    if as_json:
        typer.echo(json.dumps({"bundle": receipt.bundle, "already": receipt.already}))
    else:
        done = "was there already" if receipt.already else "submitted; the owner plugs it in with `cloud_node plug-in`"
        typer.echo(f"{receipt.bundle} {done}")


def span_of(span: str | None) -> Literal["remote", "emulated", "local"] | None:
    """The value of --span.

    Raises:
        UsageError: there is no such span.
    """
    if span not in (None, "remote", "emulated", "local"):
        raise UsageError(f"no span {span!r}; use remote, emulated or local")
    return span  # type: ignore[return-value]


app.add_typer(report_cli.app)
