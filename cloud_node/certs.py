"""`cloud_node certs`: the model owner's authority and the identities it hands out, renews and revokes.

Knows flags and what to say next; what is done is in `isthmus.trust`.
"""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer
from cryptography.x509.oid import ExtendedKeyUsageOID

from isthmus.errors import UsageError
from isthmus.trust import certificates, renewing
from isthmus.trust.profiles import AUTHORITY, DAYS, HOUR, Usage, purposes_of
from isthmus.trust.revocation import read_list

app = typer.Typer(no_args_is_help=True, help="Make the authority and issue identities for mutual TLS.")

Directory = Annotated[Path, typer.Option("--dir", help="Folder of the authority and its identities.")]
Days = Annotated[float | None, typer.Option(help=f"Days until the certificate expires [{DAYS}].")]
Hours = Annotated[float | None, typer.Option(help="The same in hours, instead of --days.")]


@app.command(epilog="Example: cloud_node certs init --dir certs --san gpu.example.org --san 10.0.0.7")
def init(
    directory: Directory = Path("certs"),
    san: Annotated[
        list[str] | None,
        typer.Option(
            help="DNS name or IP address that clients dial; repeat for more. Without: localhost and 127.0.0.1."
        ),
    ] = None,
    days: Days = None,
    hours: Hours = None,
) -> None:
    """Make an authority and, under it, the server's identity."""
    lasting = _days(days, hours)
    certificates.init_authority(directory, san or ("localhost", "127.0.0.1"), lasting)
    typer.echo(f"authority  {directory / AUTHORITY}  (its keys sign everything: keep it off the server)")
    typer.echo(f"server     {directory / 'server'}  valid {_lasts(lasting)}")
    typer.echo(f"next: cloud_node certs issue --name alice --dir {shlex.quote(str(directory))}")


@app.command(epilog="Example: cloud_node certs issue --name alice --dir certs --days 90")
def issue(
    name: Annotated[str, typer.Option(help="Name of the identity: a-z, 0-9, '.', '_', '-'.")],
    directory: Directory = Path("certs"),
    san: Annotated[
        list[str] | None,
        typer.Option(help="A server's DNS name or IP address, or spiffe://DOMAIN/PATH; repeat for more."),
    ] = None,
    usage: Annotated[Usage, typer.Option(help="Which side of a connection it may take.")] = "client",
    days: Days = None,
    hours: Hours = None,
) -> None:
    """Issue an identity: a folder to be handed to one edge, or to one more server."""
    lasting = _days(days, hours)
    folder = certificates.issue(directory, name, san or (), usage, lasting)
    typer.echo(f"{usage}  {folder}  valid {_lasts(lasting)}")
    if usage == "server":
        typer.echo(f"next: cloud_node serve --certs {shlex.quote(str(folder))} --model DIR_OR_ID")
    else:
        typer.echo(
            f"next: hand {folder} over a safe channel, then there: edge_client train --server HOST:PORT --certs DIR ..."
        )


@app.command(epilog="Example: cloud_node certs rotate --name alice --dir certs --revoke-old")
def rotate(
    name: Annotated[str, typer.Option(help="Name of the identity, or `authority` for a new authority.")],
    directory: Directory = Path("certs"),
    san: Annotated[list[str] | None, typer.Option(help="Instead of the names it has; repeat for more.")] = None,
    revoke_old: Annotated[bool, typer.Option(help="Refuse the certificates that it had before.")] = False,
    signing_key: Annotated[bool, typer.Option(help="Also give it a new key to sign adapters with.")] = False,
    days: Days = None,
    hours: Hours = None,
) -> None:
    """Give an identity a new key and certificate in place; servers and edges that run take it up by themselves."""
    if name == AUTHORITY:
        if san or revoke_old or signing_key or days is not None or hours is not None:
            raise UsageError("a new authority takes no further flags; leave them out")
        renewing.rotate_authority(directory)
        typer.echo(f"authority  {directory / AUTHORITY}  new; the old one is trusted too, until `certs retire`")
        typer.echo(
            "next: rotate each edge and hand its folder out again, then the servers, then: cloud_node certs retire"
        )
        return
    lasting = _days(days, hours)
    folder = renewing.rotate(directory, name, lasting, san, revoke_old, signing_key)
    typer.echo(f"{folder}  valid {_lasts(lasting)}")
    typer.echo(f"next: where it is used elsewhere, copy {folder} there again; nothing needs a restart")


@app.command(epilog="Example: cloud_node certs revoke --name alice --dir certs")
def revoke(
    name: Annotated[str, typer.Option(help="Name of the identity.")], directory: Directory = Path("certs")
) -> None:
    """Refuse an identity from now on: its open sessions end, too."""
    count = renewing.revoke(directory, name)
    typer.echo(f"{name}  {count} certificate(s) revoked; servers in {directory} know it within seconds")
    typer.echo(f"next: copy {directory / AUTHORITY / 'crl.pem'} into the folder of each server that is elsewhere")


@app.command(epilog="Example: cloud_node certs retire --dir certs")
def retire(directory: Directory = Path("certs")) -> None:
    """After `rotate --name authority`: trust the old authority no more."""
    renewing.retire_authority(directory)
    typer.echo(f"{directory / AUTHORITY}  the old authority is no longer trusted here")
    typer.echo("next: copy ca.pem into the folders of servers and edges that are elsewhere")


@app.command("list", epilog="Example: cloud_node certs list --dir certs")
def list_identities(
    directory: Directory = Path("certs"),
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Name every identity here, which side it may take, and until when."""
    newest = certificates.authority_of(directory).subject
    home = directory / AUTHORITY
    revoked = read_list(home, (home / "ca.pem").read_bytes())
    told = []
    for folder in certificates.identities(directory):
        found = certificates.load_certificate(folder / "cert.pem")
        usage = "server" if ExtendedKeyUsageOID.SERVER_AUTH in purposes_of(found) else "client"
        until, serial = found.not_valid_after_utc.isoformat(), f"{found.serial_number:x}"
        notes = {"revoked": found.serial_number in revoked, "old_authority": found.issuer != newest}
        told.append({"name": folder.name, "usage": usage, "expires": until, "serial": serial, **notes})
        if not as_json:
            shown = ", ".join(note.replace("_", " ") for note, holds in notes.items() if holds)
            typer.echo(f"{folder.name:<20}  {usage}  until {until[:16]} UTC  {shown}".rstrip())
    if as_json:
        typer.echo(json.dumps(told))


def _days(days: float | None, hours: float | None) -> float:
    if days is not None and hours is not None:
        raise UsageError("--days and --hours say the same; give one")
    return days if days is not None else hours * HOUR if hours is not None else DAYS


def _lasts(days: float) -> str:
    return f"{days:g} days" if days >= 1 else f"{days / HOUR:g} hours"
