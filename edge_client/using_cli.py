"""The command line for using a run's model: `edge_client predict` and `chat`.

Knows flags, the terminal and what to print; everything else is called.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from edge_client.finished_cli import AnyCerts, AnyServer, Insecure, SealKey, Span, Threads, WholeModel, span_of
from edge_client.shown import show_text
from edge_client.terminal import console_of_progress, quiet
from isthmus.command import importing
from isthmus.errors import UsageError
from isthmus.report.units import size

app = typer.Typer()

OfRun = Annotated[Path, typer.Option("--run", help="directory of a run")]


@app.command("predict")
def predict_command(
    run: OfRun,
    data: Annotated[Path, typer.Option(help="rows to answer, JSON Lines")],
    out: Annotated[Path, typer.Option(help="file to write: the rows, each with its prediction")],
    batch_size: Annotated[int | None, typer.Option(help="rows per request [the run's for scoring]", min=1)] = None,
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="tokens to add at most")] = 64,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last answer in --out")] = False,
    span: Span = None,
    server: AnyServer = None,
    certs: AnyCerts = None,
    insecure: Insecure = False,
    model: WholeModel = None,
    threads: Threads = None,
    key_file: SealKey = None,
) -> None:
    """Answer rows with a run's adapter, greedily. With --span remote, hidden states of the rows are sent.

    {"prompt"}, {"text"} and {"messages"} are gone on with, of {"prompt", "choices"} the likeliest choice is taken, and
    other keys are carried through. A classifier's run tells the label of each {"text"}.

    Example: edge_client predict --run runs/first --data new.jsonl --out answers.jsonl
    """
    with quiet():
        with importing():
            from edge_client.finished import Using
            from edge_client.predicting import predict

        using = Using(span_of(span), server, certs, model, insecure=insecure, threads=threads, key_file=key_file)
        done = predict(run, data, out, using, console_of_progress(), new_tokens, batch_size, resume)
    before = f" after {done.present:,} that were there" if done.present else ""
    pace = f", {done.rows / done.seconds:.2f} rows/s" if done.seconds else ""
    typer.echo(f"{done.rows:,} rows answered{before}{pace}: {out}")
    typer.echo(f"{size(done.up_bytes)} up, {size(done.down_bytes)} down")


@app.command("chat")
def chat_command(
    run: OfRun,
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="tokens of an answer at most")] = 256,
    system: Annotated[str | None, typer.Option(help="what the model is told before the conversation")] = None,
    temperature: Annotated[float | None, typer.Option(help="draw tokens at this temperature [greedy]")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the likeliest tokens of so much in all [1]")] = None,
    seed: Annotated[int | None, typer.Option(help="of the draws [another each time]", min=0)] = None,
    span: Span = None,
    server: AnyServer = None,
    certs: AnyCerts = None,
    insecure: Insecure = False,
    model: WholeModel = None,
    threads: Threads = None,
    key_file: SealKey = None,
) -> None:
    """Talk with a run's model. With --span remote, hidden states of what is said are sent.

    A line is a turn, from a terminal or a pipe. Ctrl-C stops an answer; /new begins anew, /costs prints what crossed;
    /quit, Ctrl-D, or Ctrl-C between answers ends.

    Example: edge_client chat --run runs/first --system "Answer in one sentence."
    """
    if temperature is None and not (top_p is None and seed is None):
        raise UsageError("--top-p and --seed are for drawing tokens; give --temperature as well")
    if temperature is not None and temperature <= 0:
        raise UsageError(f"--temperature {temperature} is not above 0; leave it out for greedy answers")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p} is outside 0 to 1; 1 draws from all tokens")
    with quiet():
        with importing():
            from edge_client.chatting import converse
            from edge_client.finished import Using
            from edge_client.generation import Drawing

        using = Using(span_of(span), server, certs, model, insecure=insecure, threads=threads, key_file=key_file)
        drawing = None if temperature is None else Drawing(temperature, 1.0 if top_p is None else top_p, seed)
        converse(run, using, _typed(), show_text, console_of_progress(), new_tokens, system, drawing)


def _typed() -> Iterator[str]:
    """Lines of standard input; on a terminal each is asked for, and Ctrl-C ends them as Ctrl-D does."""
    asking = ""
    if sys.stdin.isatty():
        asking = "> "
        with suppress(ImportError):
            import readline  # noqa: F401 (what is typed can be edited)
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(asking)
