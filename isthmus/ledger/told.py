"""What stages cost that somebody else did: a record in a ledger's own lines, after a head that says of what it is.

Knows the record and its limits; measures nothing. An edge has it from a peer, so everything in it is checked.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from isthmus.durable import write_whole
from isthmus.errors import BundleError
from isthmus.ledger.figures import Phase, an_object, whole
from isthmus.ledger.record import Ledger

SCHEMA: Final = "isthmus-costs/1"

ENDING: Final = ".costs.jsonl"
"""Of the record's name; the rest is that of the folder beside which it stands."""

OWNERS: Final[tuple[Phase, ...]] = ("build", "distil", "measure", "plug-in", "score")
"""Stages at the model's owner."""

MAX_BYTES: Final = 16 << 20
"""Of a record on disk, which has a line for each step."""

MAX_SENT_BYTES: Final = 64 << 10
"""Of a record that a server sends, which has a line for each stage."""

_MOST: Final = 1e30
"""More than any figure can be, and few enough digits to be shown."""


@dataclass(frozen=True)
class Told:
    """What whoever did it says of its costs.

    Attributes:
        of: the id of an emulator's bundle, or of the adapter that was plugged in the SHA-256 of the tensors.
        stored_bytes: of what came of it.
        ledger: what was spent, by stage.
        steps: of the stages that have some.
    """

    of: str
    stored_bytes: int
    ledger: Ledger
    steps: dict[Phase, int]

    def lines(self) -> list[str]:
        """The record with one line for each stage."""
        head = {"schema": SCHEMA, "of": self.of, "stored_bytes": self.stored_bytes}
        stages = [
            {"step": self.steps.get(phase, 0), "phase": phase, **self.ledger.totals(phase), **self.ledger.peaks(phase)}
            for phase in OWNERS
            if self.ledger.totals(phase)
        ]
        return [json.dumps(line) for line in (head, *stages)]


def beside(folder: Path) -> Path:
    """Where the record of what made a folder stands."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}{ENDING}")


def write(path: Path, of: str, stored_bytes: int, ledger_lines: Collection[str]) -> None:
    """Write a record.

    Raises:
        OSError: the disk refuses; what was there stays.
    """
    head = json.dumps({"schema": SCHEMA, "of": of, "stored_bytes": stored_bytes})
    write_whole(path, "".join(f"{line}\n" for line in (head, *ledger_lines)).encode())


def read(path: Path) -> Told | None:
    """The record at `path`; None where there is none.

    Raises:
        BundleError: it is malformed or too large, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_BYTES + 1), MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): remove it, or restore it") from None


def parse(content: bytes, limit: int = MAX_SENT_BYTES) -> Told:
    """Read a record.

    Raises:
        BundleError: it is malformed, or has more than `limit` bytes.
    """
    if len(content) > limit:
        raise BundleError(f"the record of costs has over {limit} bytes: ask the model owner")
    ledger, steps, number = Ledger(), dict[Phase, int](), 0
    try:
        of, stored = _head(json.loads(content.partition(b"\n")[0]))
        for line in content.splitlines()[1:]:
            number += 1
            found = _checked(json.loads(line))
            ledger.replay(found)
            steps[found["phase"]] = max(found["step"], steps.get(found["phase"], 0))
        _check_limits(ledger)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise BundleError(
            f"the record of costs is malformed (line {number + 1}: {reason}): ask the model owner"
        ) from None
    return Told(of, stored, ledger, steps)


def _head(line: object) -> tuple[str, int]:
    head = an_object("the head", line)
    of, schema = head.get("of"), head.get("schema")
    if schema != SCHEMA:
        raise ValueError(f"schema {str(schema)[:40]!r}; this version of isthmus reads {SCHEMA!r}")
    if not isinstance(of, str) or len(of) != 64 or set(of) - set("0123456789abcdef"):
        raise ValueError("it does not say of what it is")
    return of, whole("stored_bytes", head.get("stored_bytes"))


def _checked(line: object) -> dict[str, Any]:
    """A line of an owner's stage, with nothing in it that is not an owner's to tell."""
    found = an_object("the line", line)
    if found.get("phase") not in OWNERS:
        raise ValueError("it is of no stage at the model's owner")
    whole("step", found.get("step"))
    foreign = [name for name in found if name not in {"step", "phase"} and not name.startswith("cloud_")]
    if foreign:
        raise ValueError(f"{foreign[0][:40]!r} is not of the owner's side")
    return found


def _check_limits(ledger: Ledger) -> None:
    for phase in OWNERS:
        for name, value in {**ledger.totals(phase), **ledger.peaks(phase)}.items():
            if value >= _MOST:
                raise ValueError(f"{name} is more than anything can cost")
