"""The catalogue of errors: each one's name on the wire, gRPC status, exit code and whether trying again can help.

Knows no transport and no command line; both look their codes up here. A message is one line that says what to do.
"""

import math
from typing import ClassVar, Final

LONGEST: Final = 1000
LATEST_S: Final = 7 * 86400.0
"""No error says to come again later than that."""


class IsthmusError(Exception):
    """Base of every error that a user or peer may be shown.

    Attributes:
        retry_after_s: seconds after which the same would be taken; None: it does not say.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False
    retry_after_s: float | None = None


class UsageError(IsthmusError, ValueError):
    """A flag, key or combination of them makes no sense."""

    code, status, exit_code = "usage", "INVALID_ARGUMENT", 2


class DataError(IsthmusError, ValueError):
    """A data file is malformed; the message names file and line."""

    code, status, exit_code = "data", "INVALID_ARGUMENT", 3


class ModelError(IsthmusError, ValueError):
    """A model cannot be read, cut or served."""

    code, status, exit_code = "model", "FAILED_PRECONDITION", 4


class CutError(ModelError):
    """A cut is malformed, impossible or not offered."""

    code = "cut"


class CodecError(IsthmusError, ValueError):
    """A tensor cannot be carried by the codec asked for."""

    code, status, exit_code = "codec", "INVALID_ARGUMENT", 5


class WireError(IsthmusError, ValueError):
    """What a peer sent breaks the contract: wrong shape, type, size, order, checksum or a value that is not finite."""

    code, status, exit_code = "wire", "INVALID_ARGUMENT", 5


class LimitError(IsthmusError):
    """A request exceeds a limit that the server named in its model card, or what its policy grants."""

    code, status, exit_code = "limit", "RESOURCE_EXHAUSTED", 6

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        """Say what is too much, and after how many seconds it would not be, where waiting helps."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RepeatError(IsthmusError):
    """A request's id was used before with other content."""

    code, status, exit_code = "repeat", "ALREADY_EXISTS", 5


class NotKeptError(IsthmusError):
    """Activations or a decode cache are gone; the client sends the input again by itself."""

    code, status, exit_code = "not-kept", "FAILED_PRECONDITION", 1


class VersionError(IsthmusError):
    """The two sides speak different versions of the protocol."""

    code, status, exit_code = "version", "FAILED_PRECONDITION", 7


class CertificateError(IsthmusError):
    """A certificate, key or host name does not fit; trying again cannot help."""

    code, status, exit_code = "certificate", "UNAUTHENTICATED", 8


class OwnerError(IsthmusError, PermissionError):
    """The object belongs to another identity."""

    code, status, exit_code = "owner", "PERMISSION_DENIED", 9


class ForbiddenError(IsthmusError, PermissionError):
    """The session was opened without the right to do this, such as a backward in a forward-only session."""

    code, status, exit_code = "forbidden", "PERMISSION_DENIED", 9


class InterruptedRunError(IsthmusError):
    """The user stopped the run; the last checkpoint and the report are written."""

    code, status, exit_code = "interrupted", "CANCELLED", 10


class UnreachableError(IsthmusError, ConnectionError):
    """No server answers, or it went away and did not come back within the patience given."""

    code, status, exit_code, retryable = "unreachable", "UNAVAILABLE", 11, True


class DrainingError(IsthmusError):
    """The server is shutting down; another one, or the same one restarted, will answer."""

    code, status, exit_code, retryable = "draining", "UNAVAILABLE", 11, True


class BundleError(IsthmusError, ValueError):
    """A bundle, checkpoint or adapter on disk or from a peer is damaged, tampered with or for another model."""

    code, status, exit_code = "bundle", "DATA_LOSS", 12


class RunError(IsthmusError, ValueError):
    """A run directory cannot be read, resumed or compared."""

    code, status, exit_code = "run", "FAILED_PRECONDITION", 13


class AuditError(IsthmusError):
    """What is done cannot be written to the audit log, or an audit log is not what was written."""

    code, status, exit_code, retryable = "audit", "UNAVAILABLE", 14, True


def catalogue() -> dict[str, type[IsthmusError]]:
    """Every error by its name on the wire."""
    found: dict[str, type[IsthmusError]] = {}
    pending: list[type[IsthmusError]] = [IsthmusError]
    while pending:
        error = pending.pop()
        found[error.code] = error
        pending.extend(error.__subclasses__())
    return found


def from_wire(code: str, message: str, retry_after_s: float = 0.0) -> IsthmusError:
    """The error that a peer named; an unknown name becomes an internal error that keeps the name.

    It is one line of at most `LONGEST` characters that can be printed, whatever the peer sent. `retry_after_s` is what
    the peer said of when to come again; 0, and what makes no sense, is nothing said.
    """
    error = catalogue().get(code)
    line = " ".join((message if error else f"{code}: {message}").split())
    shown = "".join(letter if letter.isprintable() else "?" for letter in line[:LONGEST])
    found = (error or IsthmusError)(shown or "no reason was given; see the other side's log")
    if math.isfinite(retry_after_s) and retry_after_s > 0:
        found.retry_after_s = min(retry_after_s, LATEST_S)
    return found
