"""Errors of the catalogue as gRPC statuses and in-band failures, and back.

Knows names and messages; raises nothing of its own.
"""

import grpc

from isthmus.errors import IsthmusError, from_wire
from isthmus.wire.gen import backbone_pb2 as pb

SEPARATOR = ": "
LATER = "@"
"""Stands in a status between an error's name and the seconds after which to come again, where it says when."""


def status_code(error: IsthmusError) -> grpc.StatusCode:
    """The gRPC status that an error ends a call with."""
    return grpc.StatusCode[error.status]


def status_details(error: IsthmusError) -> str:
    """A status text from which `read_status` finds the error again."""
    later = f"{LATER}{error.retry_after_s:.3f}" if error.retry_after_s is not None else ""
    return f"{error.code}{later}{SEPARATOR}{error}"


def read_status(details: str | None) -> IsthmusError | None:
    """The error in a status text; None when the text is not of `status_details`."""
    named, separator, message = (details or "").partition(SEPARATOR)
    code, _, later = named.partition(LATER)
    error = from_wire(code, message, _seconds(later)) if separator else None
    return error if error is not None and error.code == code else None


def failure(error: IsthmusError) -> pb.Failure:
    """An error as it travels inside a stream."""
    return pb.Failure(code=error.code, message=str(error), retry_after_s=error.retry_after_s or 0.0)


def read_failure(message: pb.Failure) -> IsthmusError:
    """The error that a peer sent inside a stream."""
    return from_wire(message.code, message.message, message.retry_after_s)


def _seconds(text: str) -> float:
    """A peer's number; 0 where it is none."""
    try:
        return float(text[:32])
    except ValueError:
        return 0.0
