"""`edge_client doctor`: look at everything between this edge and a server, in the order in which it is needed.

Knows the order and what depends on what; each check stands in a `doctor_*` file beside this one.
"""

import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

from edge_client import doctor_here, doctor_line, doctor_served
from edge_client.examined import Patient, Verdict
from isthmus.errors import IsthmusError

SCHEMA: Final = "isthmus-doctor/1"


def _round_trip(patient: Patient) -> Verdict:
    from edge_client import doctor_speed

    return doctor_speed.round_trip(patient)


def _bandwidth(patient: Patient) -> Verdict:
    from edge_client import doctor_speed

    return doctor_speed.bandwidth(patient)


@dataclass(frozen=True)
class _Check:
    """A check, and those without which it makes no sense."""

    name: str
    look: Callable[[Patient], Verdict]
    needs: tuple[str, ...] = ()


CHECKS: Final = (
    _Check("identity", doctor_here.identity),
    _Check("proxy", doctor_here.proxy),
    _Check("name", doctor_line.name),
    _Check("connection", doctor_line.connection, ("name",)),
    _Check("handshake", doctor_line.handshake, ("identity", "connection")),
    _Check("certificate", doctor_line.certificate, ("handshake",)),
    _Check("versions", doctor_served.versions, ("handshake",)),
    _Check("authority", doctor_served.authority, ("versions",)),
    _Check("clock", doctor_served.clock, ("versions",)),
    _Check("model", doctor_served.model, ("versions",)),
    _Check("room", doctor_here.room, ("model",)),
    _Check("health", doctor_served.health, ("versions",)),
    _Check("session", doctor_served.session, ("model",)),
    _Check("token", doctor_served.token, ("session",)),
    _Check("round trip", _round_trip, ("session",)),
    _Check("bandwidth", _bandwidth, ("token", "round trip")),
)


@dataclass(frozen=True)
class Finding:
    """What came of a check; `exit_code` is 0 unless it failed."""

    check: str
    outcome: str
    says: str
    exit_code: int
    seconds: float
    figures: dict[str, float]


def examine(patient: Patient) -> Generator[Finding, None, None]:
    """Every check's finding, as soon as it is there. Whatever was opened at the server is closed in the end."""
    well: dict[str, bool] = {}
    try:
        for check in CHECKS:
            lacking = next((name for name in check.needs if not well[name]), None)
            found = _looked(check, patient) if lacking is None else _skipped(check, lacking)
            well[check.name] = lacking is None and found.exit_code == 0
            yield found
    finally:
        if patient.link is not None:
            with suppress(IsthmusError):
                patient.link.close()


def exit_code(findings: list[Finding]) -> int:
    """Of the first check that failed; 0 where none did."""
    return next((found.exit_code for found in findings if found.exit_code), 0)


def as_json(patient: Patient, findings: list[Finding]) -> dict[str, Any]:
    """The findings for programs."""
    checks = [asdict(found) for found in findings]
    return {"schema": SCHEMA, "server": patient.server, "exit_code": exit_code(findings), "checks": checks}


def _looked(check: _Check, patient: Patient) -> Finding:
    began = time.perf_counter()
    try:
        verdict, code = check.look(patient), 0
    except IsthmusError as error:
        verdict, code = Verdict("fail", str(error)), error.exit_code
    says = " ".join(verdict.says.split())
    return Finding(check.name, verdict.outcome, says, code, time.perf_counter() - began, verdict.figures)


def _skipped(check: _Check, lacking: str) -> Finding:
    return Finding(check.name, "skip", f"not looked at: it needs {lacking!r}", 0, 0.0, {})
