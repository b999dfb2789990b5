"""The command line for cores that are to be used elsewhere: `edge_client export`.

Knows flags and what to print; everything else is called.
"""

from pathlib import Path
from typing import Annotated

import typer

from edge_client.finished_cli import SealKey
from edge_client.terminal import console_of_progress, quiet
from isthmus.command import importing

app = typer.Typer()


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Option(help="directory of a run with --exchange core")],
    out: Annotated[Path, typer.Option(help="folder to write, in peft's format")],
    model: Annotated[str | None, typer.Option(help="the whole model, if its owner has granted it")] = None,
    key_file: SealKey = None,
) -> None:
    """Fold a run's cores with the factors around them to an ordinary LoRA, which plain peft loads.

    The factors are made of the model's weights, so it takes the whole model; without it cores work over the wire only.

    Example: edge_client export --run runs/core --model models/whole --out lora
    """
    with quiet():
        with importing():
            from edge_client.exporting import export_cores

        modules = export_cores(run, model, out, console_of_progress(), key_file)
    typer.echo(f"{modules} modules as an ordinary LoRA: {out}")
