"""What a round service must not forget, on disk: terms, attempts counted, what edges are bound to, and sums.

Knows a folder for each run's name and how to write there; decides nothing. A sum is on the disk before anybody is
told it.
"""

import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isthmus.durable import write_whole
from isthmus.errors import BundleError
from isthmus.faults import Fault, passing

KEPT = 256
"""Sums kept of a run; an edge that was away for more rounds begins anew."""


@dataclass(frozen=True)
class Sum:
    """A round that is done: uint32 little-endian, how many edges it is of, and SHA-256 in hex of what each sent."""

    total: bytes
    attempt: int
    submissions: dict[str, str]


@dataclass
class Kept:
    """A run: `commitments` (hex, by identity) are of the round that is next."""

    run: str
    terms: str  # hex of the message
    attempts: int = 0
    done: int = 0
    commitments: dict[str, str] = field(default_factory=dict)


class RoundStore:
    """The folders of all runs; not for several threads at once."""

    def __init__(self, directory: Path) -> None:
        """Keep them in `directory`, made if need be; no other node may use it.

        Raises:
            BundleError: it cannot be written.
        """
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(f"--rounds: {directory} cannot be written ({error.strerror}): choose another") from None

    def names(self) -> list[str]:
        """Of the runs that there are."""
        return sorted(path.parent.name for path in self._directory.glob("*/run.json"))

    def begin(self, name: str, terms: bytes) -> Kept:
        """Make a run's folder, with an id that no run had.

        Raises:
            BundleError: as `save`.
        """
        kept = Kept(run=secrets.token_hex(8), terms=terms.hex())
        self.save(name, kept)
        return kept

    def load(self, name: str) -> Kept:
        """A run as it was saved; a sum that was written after that counts.

        Raises:
            BundleError: the file is damaged.
        """
        path = self._directory / name / "run.json"
        try:
            kept = Kept(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise BundleError(f"{path} is damaged ({error}): restore it, or move the folder away") from None
        if self._sum(name, kept.done + 1).exists():
            kept.done, kept.commitments = kept.done + 1, {}
        return kept

    def save(self, name: str, kept: Kept) -> None:
        """Write a run down.

        Raises:
            BundleError: the disk refuses.
        """
        self._write(self._directory / name / "run.json", json.dumps(asdict(kept)).encode())

    def add(self, name: str, kept: Kept, done: Sum) -> None:
        """Keep the sum of the next round, and go on to the one after it.

        Raises:
            BundleError: the disk refuses.
        """
        head = json.dumps({"attempt": done.attempt, "submissions": done.submissions}).encode()
        passing(Fault.ROUND_BEFORE_SUM)
        self._write(self._sum(name, kept.done + 1), head + b"\n" + done.total)
        passing(Fault.ROUND_AFTER_SUM)
        kept.done, kept.commitments = kept.done + 1, {}
        self.save(name, kept)
        self._sum(name, kept.done - KEPT).unlink(missing_ok=True)

    def sum_of(self, name: str, number: int) -> Sum:
        """The sum of a round that is done.

        Raises:
            BundleError: it is not kept any more, or damaged.
        """
        try:
            head, _, total = self._sum(name, number).read_bytes().partition(b"\n")
            said: dict[str, Any] = json.loads(head)
            return Sum(total, said["attempt"], said["submissions"])
        except (OSError, ValueError, KeyError):
            raise BundleError(f"round {number} of {name} is not kept here any more: begin a new run") from None

    def _sum(self, name: str, number: int) -> Path:
        return self._directory / name / f"round-{number:08d}.sum"

    def _write(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            raise BundleError(f"the node cannot keep the round ({error.strerror}): tell the model owner") from None
