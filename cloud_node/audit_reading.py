"""What an audit log says: whether it is as it was written, and what each tenant used.

Knows the lines' fields and the files of a log; writes nothing.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from cloud_node.audit import pieces
from isthmus.errors import AuditError, UsageError
from isthmus.trust.chain import End, read

FIGURES = ("requests", "refused", "tokens", "received_bytes", "sent_bytes", "flops", "seconds")
"""What a session's lines count, each from its opening on."""


@dataclass
class Used:
    """What one tenant used.

    Attributes:
        sessions: that were opened; one whose end is not told was under way when its node stopped.
        calls: answered calls beside sessions: describe, fetches, submissions.
        refusals: sessions and calls that were refused; `refused` are requests within sessions.
        tokens: whose forward or decode was answered.
        received_bytes: of all frames that came.
        sent_bytes: of all frames that left.
        flops: that the span computed.
        seconds: of computing, without waiting.
    """

    tenant: str
    sessions: int = 0
    calls: int = 0
    refusals: int = 0
    requests: int = 0
    refused: int = 0
    tokens: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0


COLUMNS = tuple(each.name for each in fields(Used))


@dataclass
class _Tenant:
    used: Used
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)  # the newest line of each that is open


def lines(path: Path) -> Iterator[tuple[Path, dict[str, Any], End]]:
    """Every line of a log, checked, with the file that it stands in.

    Raises:
        AuditError: one is not as it was written; the message names file and line.
        UsageError: there is no log.
    """
    found = pieces(path)
    if not found:
        raise UsageError(f"there is no audit log {path}; name the file that `cloud_node serve --audit` writes")
    end = End()
    for piece in found:
        try:
            with piece.open("rb") as file:
                for said, after in read(file, end):
                    end = after
                    yield piece, said, end
        except AuditError as error:
            raise AuditError(f"{piece}: {error}") from None
        except OSError as error:
            raise UsageError(f"{piece} cannot be read ({error.strerror})") from None


def verify(path: Path, expected: str | None = None) -> tuple[int, End]:
    """How many lines there are, and where the chain stands.

    Args:
        path: the file that is written; earlier pieces stand beside it.
        expected: a hash that one of the lines must have, as it was noted elsewhere: else lines were taken off the end.

    Raises:
        AuditError: a line is not as it was written, or none has the expected hash.
        UsageError: there is no log.
    """
    count, end, met = 0, End(), expected is None
    for _, _, end in lines(path):
        count += 1
        met = met or end.hash == expected
    if not met:
        raise AuditError(
            f"{path}: no line has the hash {expected}: the end of the log was taken away, or it is another"
        )
    return count, end


def usage(path: Path, since: datetime | None = None, until: datetime | None = None) -> list[Used]:
    """What each tenant used in sessions that were opened, and calls that were made, in that time; by name.

    Raises:
        AuditError, UsageError: as `verify`.
    """
    tenants: dict[str, _Tenant] = {}
    for _, said, _ in lines(path):
        at = datetime.fromisoformat(said["time"])
        if said["actor"] == "node":
            continue
        tenant = tenants.setdefault(said["actor"], _Tenant(Used(said["actor"])))
        known = said["object"] in tenant.sessions
        if known or ((since is None or at >= since) and (until is None or at < until)):
            _count(tenant, said)
    for tenant in tenants.values():
        for said in tenant.sessions.values():
            _add(tenant.used, said)
    used = [tenant.used for tenant in tenants.values()]
    return sorted((each for each in used if any(list(asdict(each).values())[1:])), key=lambda each: each.tenant)


def _count(tenant: _Tenant, said: dict[str, Any]) -> None:
    used, name = tenant.used, said["object"]
    match said["action"]:
        case "open" if said["outcome"] == "ok":
            if name in tenant.sessions:  # its node died before it could tell the end
                _add(used, tenant.sessions[name])
            used.sessions += 1
            tenant.sessions[name] = said
        case "so-far" | "close":
            if name in tenant.sessions:
                tenant.sessions[name] = said
            if said["action"] == "close" and tenant.sessions.pop(name, None) is not None:
                _add(used, said)
        case _ if said["outcome"] == "ok":
            used.calls += 1
            _add(used, said)
        case _:
            used.refusals += 1
            _add(used, said)


def _add(used: Used, said: dict[str, Any]) -> None:
    for name in FIGURES:
        setattr(used, name, getattr(used, name) + said.get(name, 0))
