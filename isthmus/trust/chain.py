"""Lines that are chained by their hashes, so that whoever has the newest hash can check every line before it.

Knows canonical JSON and SHA-256; what lines say, and where they are kept, is decided elsewhere. A line's hash is over
the line without it, the hash of the line before it included (as certificate transparency and git have it). A chain
shows that something was changed, not by whom; who may write the file may also make a new chain, which is why the
newest hash is to be kept elsewhere.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.errors import AuditError

START = "0" * 64
"""What the first line has for the hash of the line before it."""

LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class End:
    """Where a chain stands: the number of its newest line, and that line's hash."""

    number: int = -1
    hash: str = START


def line_after(end: End, fields: Mapping[str, Any]) -> tuple[bytes, End]:
    """The next line with these fields, its newline included, and where the chain stands then."""
    content = {**fields, "n": end.number + 1, "previous": end.hash}
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    return _canonical({**content, "hash": digest}) + b"\n", End(end.number + 1, digest)


def read(lines: Iterable[bytes], end: End | None = None) -> Iterator[tuple[dict[str, Any], End]]:
    """Each line's fields, and where the chain stands after it.

    Args:
        lines: whole lines, with their newlines.
        end: the line before them; None: the first may be any, as when its predecessors were taken away.

    Raises:
        AuditError: a line is not what was written, or not after the one before it; the message says which.
    """
    for place, line in enumerate(lines, start=1):
        fields = _fields(line, place)
        number, previous, told = fields["n"], fields["previous"], fields.pop("hash")
        if hashlib.sha256(_canonical(fields)).hexdigest() != told:
            raise AuditError(f"line {place} (n {number}) was changed: its hash is not that of what it says")
        if end is not None and (number, previous) != (end.number + 1, end.hash):
            expected = f"line {place} has n {number} and should have n {end.number + 1}"
            why = (
                expected if number != end.number + 1 else f"line {place} (n {number}) does not follow the one before it"
            )
            raise AuditError(f"{why}: a line was changed, removed, added or moved here")
        end = End(number, told)
        yield fields, end


def _fields(line: bytes, place: int) -> dict[str, Any]:
    torn = AuditError(f"line {place} is no line of an audit log: it was changed, or torn when it was written")
    if not line.endswith(b"\n") or len(line) > LONGEST_LINE:
        raise torn
    try:
        fields = json.loads(line)
        whole = isinstance(fields, dict) and _canonical(fields) + b"\n" == line
    except (ValueError, RecursionError):
        raise torn from None
    kinds = {"n": int, "previous": str, "hash": str}
    if not whole or any(type(fields.get(name)) is not kind for name, kind in kinds.items()):
        raise torn
    return dict(fields)


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
