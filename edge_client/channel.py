"""A gRPC channel to a cloud node, and what a call on one means that failed.

Knows addresses, credentials and statuses; knows no sessions and no tensors.
"""

import grpc

from isthmus.errors import CertificateError, ForbiddenError, IsthmusError, LimitError, UnreachableError, WireError
from isthmus.trust.address import split_address
from isthmus.trust.credentials import Credentials, diagnose
from isthmus.wire import options
from isthmus.wire.status import read_status

LOST = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
)

"""Statuses of a line that broke, or of a server that went away."""

FULL = "Concurrent RPC limit exceeded"
"""What gRPC says for a server with all the calls that it takes."""


def open_channel(address: str, credentials: Credentials | None) -> grpc.Channel:
    """A channel to `HOST:PORT`, with mutual TLS where credentials are given, as their folder has them now."""
    if credentials is None:
        return grpc.insecure_channel(address, options=options.CLIENT)
    return grpc.secure_channel(address, credentials.fresh().channel(), options=options.CLIENT)


def explain(error: grpc.RpcError, address: str, credentials: Credentials | None) -> IsthmusError:
    """What a failed call means: the server's own error, else what one handshake outside gRPC finds."""
    named = read_status(error.details())
    if named is not None:
        return named
    details = " ".join((error.details() or "").split())
    if error.code() in LOST or "RST_STREAM" in details:
        found = diagnose(*split_address(address), credentials)
        return found or UnreachableError(
            f"{address} broke the connection ({details}); check that a cloud node is running there"
        )
    return _unnamed(error.code(), details, address)


def _unnamed(code: grpc.StatusCode, details: str, address: str) -> IsthmusError:
    """A status that no cloud node named: of gRPC itself, or of what stands between."""
    said = f"{address} answered {code.name}: {details}"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return WireError(f"{address} is not an Isthmus cloud node; check the address")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return CertificateError(f"{said}; ask the model owner for an identity with --certs DIR")
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return ForbiddenError(f"{said}; ask the model owner to allow this identity what you asked for")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return UnreachableError(f"{address} is full; try later") if FULL in details else LimitError(said)
    return WireError(said)
