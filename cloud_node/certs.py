"""`cloud_node certs`: the model owner's authority and the identities it hands out.

Knows flags and what to say next; the certificates are made by `isthmus.trust.certificates`.
"""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from isthmus.trust import certificates

app = typer.Typer(no_args_is_help=True, help="Make the authority and issue identities for mutual TLS.")

Directory = Annotated[Path, typer.Option("--dir", help="Folder of the authority and its identities.")]
Days = Annotated[int, typer.Option(help="Days until the certificate expires.")]


@app.command(epilog="Example: cloud_node certs init --dir certs --san gpu.example.org --san 10.0.0.7")
def init(
    directory: Directory = Path("certs"),
    san: Annotated[
        list[str] | None,
        typer.Option(
            help="DNS name or IP address that clients dial; repeat for more. Without: localhost and 127.0.0.1."
        ),
    ] = None,
    days: Days = 30,
) -> None:
    """Make an authority and, under it, the server's identity."""
    certificates.init_authority(directory, san or ("localhost", "127.0.0.1"), days)
    typer.echo(f"authority  {directory / certificates.AUTHORITY}  (its keys sign everything: keep it off the server)")
    typer.echo(f"server     {directory / 'server'}  valid {days} days")
    typer.echo(f"next: cloud_node certs issue --name alice --dir {shlex.quote(str(directory))}")


@app.command(epilog="Example: cloud_node certs issue --name alice --dir certs --days 90")
def issue(
    name: Annotated[str, typer.Option(help="Name of the identity: a-z, 0-9, '.', '_', '-'.")],
    directory: Directory = Path("certs"),
    san: Annotated[
        list[str] | None, typer.Option(help="DNS name or IP address, for a server; repeat for more.")
    ] = None,
    usage: Annotated[certificates.Usage, typer.Option(help="Which side of a connection it may take.")] = "client",
    days: Days = 30,
) -> None:
    """Issue an identity: a folder to be handed to one edge, or to one more server."""
    folder = certificates.issue(directory, name, san or (), usage, days)
    typer.echo(f"{usage}  {folder}  valid {days} days")
    if usage == "server":
        typer.echo(f"next: cloud_node serve --certs {shlex.quote(str(folder))} --model DIR_OR_ID")
    else:
        typer.echo(
            f"next: hand {folder} over a safe channel, then there: edge_client train --server HOST:PORT --certs DIR ..."
        )
