"""A gRPC channel to a cloud node, and what a call on one means that failed.

Knows addresses, credentials and statuses; knows no sessions and no tensors.
"""

import grpc

from isthmus.errors import IsthmusError, UnreachableError, WireError
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


def open_channel(address: str, credentials: Credentials | None) -> grpc.Channel:
    """A channel to `HOST:PORT`, with mutual TLS where credentials are given."""
    if credentials is None:
        return grpc.insecure_channel(address, options=options.CLIENT)
    return grpc.secure_channel(address, credentials.channel(), options=options.CLIENT)


def explain(error: grpc.RpcError, address: str, credentials: Credentials | None) -> IsthmusError:
    """What a failed call means: the server's own error, else what one handshake outside gRPC finds."""
    named = read_status(error.details())
    if named is not None:
        return named
    if error.code() in LOST:
        found = diagnose(*split_address(address), credentials)
        return found or UnreachableError(
            f"{address} broke the connection ({error.details()}); check that a cloud node is running there"
        )
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return WireError(f"{address} is not an Isthmus cloud node; check the address")
    return WireError(f"{address} answered {error.code().name}: {error.details()}")
