"""JSON Lines: the objects of a file, and in which line what is wrong with one.

Knows JSON and files; knows nothing of what an object may hold.
"""

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from isthmus.errors import DataError


def lines_of(path: Path, shapes: str) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """The objects of a file with their lines and the numbers of these; blank lines are skipped.

    Args:
        path: of the file.
        shapes: what a row may look like, for whoever gave an empty file.

    Raises:
        DataError: the file cannot be read or holds no rows, or a line is no object.
    """
    try:
        raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not raw.strip():
        raise DataError(f"{path}: holds no rows; write one JSON object a line: {shapes}")
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            with at_line(path, number):
                row = _parse(line, shapes)
            yield number, line, row


@contextmanager
def at_line(path: Path, number: int) -> Iterator[None]:
    """Say of what is wrong in here in which line it is: `FILE:LINE: what; what to do`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}:{number}: {error}") from error


def _parse(line: bytes, shapes: str) -> dict[str, Any]:
    """The object that one line holds."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8; convert the file, for example with iconv") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"is not JSON ({error.msg.removesuffix(' at')} at column {error.colno}); write one object a line"
        ) from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError("holds a number or nesting beyond what JSON readers take; simplify the row") from error
    if not isinstance(row, dict):
        raise DataError(f"is not a JSON object; accepted are {shapes}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, if no key stands in it twice."""
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise DataError(f"names the key {key!r} twice; keep one")
        row[key] = value
    return row


def _constant(name: str) -> NoReturn:
    raise DataError(f"holds {name}, which is not JSON; write a number or leave the row out")
