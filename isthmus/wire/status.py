"""Errors of the catalogue as gRPC statuses and in-band failures, and back.

Knows names and messages; raises nothing of its own.
"""

import grpc

from isthmus.errors import IsthmusError, from_wire
from isthmus.wire.gen import backbone_pb2 as pb

SEPARATOR = ": "


def status_code(error: IsthmusError) -> grpc.StatusCode:
    """The gRPC status that an error ends a call with."""
    return grpc.StatusCode[error.status]


def status_details(error: IsthmusError) -> str:
    """A status text from which `read_status` finds the error again."""
    return f"{error.code}{SEPARATOR}{error}"


def read_status(details: str | None) -> IsthmusError | None:
    """The error in a status text; None when the text is not of `status_details`."""
    code, separator, message = (details or "").partition(SEPARATOR)
    error = from_wire(code, message) if separator else None
    return error if error is not None and error.code == code else None


def failure(error: IsthmusError) -> pb.Failure:
    """An error as it travels inside a stream."""
    return pb.Failure(code=error.code, message=str(error))


def read_failure(message: pb.Failure) -> IsthmusError:
    """The error that a peer sent inside a stream."""
    return from_wire(message.code, message.message)
