"""The command line that measures for plans: `edge_client calibrate`.

Knows flags and what to print; everything else is called.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from edge_client.terminal import console_of_progress, quiet, width
from isthmus.planning.calibration import Calibration

app = typer.Typer()


@app.command("calibrate")
def calibrate_command(
    model: Annotated[
        str | None,
        typer.Option(help="directory, config.json or shipped name of the model to plan for [leave this device out]"),
    ] = None,
    server: Annotated[str | None, typer.Option(help="HOST:PORT of the cloud node [leave the line out]")] = None,
    certs: Annotated[Path | None, typer.Option(help="folder of this edge's certificate")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plaintext to another machine")] = False,
    cut: Annotated[str | None, typer.Option(help="bottom:top; one that the server offers [its first]")] = None,
    dtype: Annotated[str, typer.Option(help="of the ends: float32 or bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads to measure with [1, and all cores]", min=1)] = None,
    out: Annotated[Path, typer.Option(help="file to write, over what was there")] = Path("calibration.json"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure this device and the line to a server, for `edge_client plan --calibration`.

    Blocks as wide as the model's run here with random weights: no weights are needed. The server is sent random numbers
    in requests as training sends them, which its own log and counters show.

    Example: edge_client calibrate --model llama-3-8b --server 127.0.0.1:7070 --certs certs/edge-a --out here.json
    """
    with quiet():
        from edge_client.calibrating import calibrate, save
        from edge_client.timed_line import settings

        line = None
        if server is not None:
            line = settings(server, certs=certs, insecure=insecure, cut=cut, dtype=dtype, device=device)
        found = calibrate(model, line, dtype, device, threads, console_of_progress())
        replaced = out.exists()
        save(found, out)
    if replaced:
        typer.echo(f"{out} was there before: this calibration has replaced it (--out names another file)", err=True)
    if as_json:
        typer.echo(found.to_json(), nl=False)
        return
    Console(width=width()).print(_table(found))
    typer.echo(f"written: {out}    use it: edge_client plan --calibration {out}")


def _table(found: Calibration) -> Table:
    table = Table(
        "measured", "forward, GFLOP/s", "backward, GFLOP/s", "a block at least, ms", "round trip, ms", "Mbit/s"
    )
    speeds = {f"this device, {threads} thread{'s' * (threads > 1)}": speed for threads, speed in found.speeds.items()}
    if found.cloud_speed is not None:
        speeds["the server's span"] = found.cloud_speed
    for name, speed in speeds.items():
        forward, backward = speed.forward, speed.backward
        least = f"{1e3 * forward.block_s:.2g} and {1e3 * backward.block_s:.2g}"
        table.add_row(name, f"{forward.flops / 1e9:.3g}", f"{backward.flops / 1e9:.3g}", least, "", "")
    if found.line is not None:
        line = found.line
        rates = f"{line.up * 8e-6:.3g} up, {line.down * 8e-6:.3g} down"
        table.add_row("the line", "", "", "", f"{1e3 * line.round_trip_s:.3g}", rates)
    return table
