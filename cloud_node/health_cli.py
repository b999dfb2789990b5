"""`cloud_node health`: ask a node whether it serves, as a container's probe or a person.

Knows flags and the standard health call; what makes a node well is its own business.
"""

import json
from pathlib import Path
from typing import Annotated

import grpc
import typer

from isthmus.errors import CertificateError, IsthmusError, UnreachableError, WireError
from isthmus.trust.address import split_address
from isthmus.trust.credentials import Credentials, diagnose
from isthmus.wire import options
from isthmus.wire.gen import health_pb2 as pb
from isthmus.wire.status import read_status

app = typer.Typer()


@app.command("health")
def health_command(
    server: Annotated[str, typer.Option(help="HOST:PORT of the cloud node")],
    certs: Annotated[Path | None, typer.Option(help="folder of a client's certificate [plaintext]")] = None,
    timeout: Annotated[float, typer.Option(help="seconds to wait for the answer", min=0.1)] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Ask a node whether a real token comes through its span; exit code 0 only if it does.

    The node runs one token in ten seconds at most, whoever asks. Nothing of yours is sent.

    Example: cloud_node health --server 127.0.0.1:7070 --certs certs/edge-a
    """
    split_address(server)
    status = _status(server, Credentials.load(certs) if certs is not None else None, timeout)
    serving = status == pb.HealthAnswer.SERVING
    if as_json:
        typer.echo(json.dumps({"server": server, "serving": serving}))
    if not serving:
        raise UnreachableError(f"{server} is not serving: its status port (/readyz) and its log say why")
    if not as_json:
        typer.echo(f"{server} is serving")


def _status(server: str, credentials: Credentials | None, timeout: float) -> int:
    channel = (
        grpc.insecure_channel(server, options=options.CLIENT)
        if credentials is None
        else grpc.secure_channel(server, credentials.channel(), options=options.CLIENT)
    )
    with channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check", pb.HealthRequest.SerializeToString, pb.HealthAnswer.FromString
        )
        try:
            answer: pb.HealthAnswer = check(pb.HealthRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise _explained(error, server, credentials) from None
    return answer.status


def _explained(error: grpc.RpcError, server: str, credentials: Credentials | None) -> IsthmusError:
    named = read_status(error.details())
    if named is not None:
        return named
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return WireError(f"{server} has no health service; check the address, and its version")
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return CertificateError(f"{server} does not know this identity; ask its owner for one")
    found = diagnose(*split_address(server), credentials)
    return found or UnreachableError(f"{server} did not answer ({error.code().name}); look at its log")
