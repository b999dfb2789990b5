"""A file of rows with their answers, that a later command can go on with.

Knows what a line looks like, and that beside the file stands what made it; knows no model.
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from edge_client.questions import ADDED, Row
from edge_client.sealed_lines import SealedLines
from isthmus.durable import write_whole
from isthmus.errors import UsageError

Answer = dict[str, Any]
"""What is added to a row."""

MadeBy = dict[str, str | int | None]
"""What answers depend on beside their rows, by name."""


@contextmanager
def going_on(
    out: Path, rows: Sequence[Row], made_by: MadeBy, resume: bool, sealed: SealedLines | None = None
) -> Iterator[tuple[FileIO, int]]:
    """The file of answers, nobody else's while in here, and how many are in it; a torn last line is cut off.

    Raises:
        BundleError: a line of it was sealed and changed since, or is sealed otherwise.
        UsageError: it holds something else, or answers that were made otherwise, or cannot be written.
    """
    try:
        file = out.open("a+b", buffering=0)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing {out}; wait for it, or choose another --out") from None
        content = out.read_bytes()
        if content and not resume:
            raise UsageError(f"{out} is there already; go on with --resume, or choose another --out")
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode(errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, start=1):
            if sealed is not None:
                line = sealed.opened(number - 1, line)
            if number > len(rows) or not _answers(line, rows[number - 1]):
                raise UsageError(f"{out}:{number} is no answer to a row of --data in its place; choose another --out")
        beside = out.with_name(f"{out.name}.made-by.json")
        if lines:
            _compare(out, beside, made_by)
        else:
            _note(beside, made_by)
        file.truncate(len(whole))
        yield file, len(lines)


def _note(beside: Path, made_by: MadeBy) -> None:
    try:
        write_whole(beside, f"{json.dumps(made_by)}\n".encode())
    except OSError as error:
        raise UsageError(f"{beside} cannot be written ({error.strerror}); choose another --out") from None


def _compare(out: Path, beside: Path, made_by: MadeBy) -> None:
    """Refuse to let another make the rest of the answers than made those that are there."""
    try:
        noted = json.loads(beside.read_bytes())
    except (OSError, ValueError):
        noted = None
    if not isinstance(noted, dict):
        raise UsageError(f"{out} holds answers, but {beside} does not tell what made them; choose another --out")
    others = [f"{name} {noted.get(name)}, not {value}" for name, value in made_by.items() if noted.get(name) != value]
    if others:
        raise UsageError(f"{out} was begun with {'; '.join(others)}: go on with the same, or choose another --out")


def _answers(line: str, row: Row) -> bool:
    """Whether a line is a row with its answer."""
    try:
        return line.startswith(f'{_opened(row)}, "{ADDED[0]}": ') and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _opened(row: Row) -> str:
    """A row's line without its closing brace: what it holds is carried through as it was written."""
    return row.line[:-1].rstrip()


def write(file: FileIO, out: Path, row: Row, answer: Answer, index: int = 0, sealed: SealedLines | None = None) -> None:
    """Append a row and its answer, sealed as the line number `index` where there is what seals it.

    Raises:
        UsageError: there is no room.
    """
    line = f"{_opened(row)}, {json.dumps(answer, ensure_ascii=False)[1:]}"
    left = f"{line if sealed is None else sealed.closed(index, line)}\n".encode()
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); make room, and go on with --resume") from None
