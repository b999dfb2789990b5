"""A ledger's file: begun once, and added to a line at a time.

Knows JSON Lines and what a disk may refuse; knows no figures.
"""

import json
from pathlib import Path

from isthmus.durable import append_lines
from isthmus.errors import RunError


def create(path: Path) -> None:
    """Begin a ledger's file.

    Raises:
        RunError: it exists already or cannot be made.
    """
    try:
        path.open("x").close()
    except FileExistsError:
        raise RunError(f"{path} exists already; resume that run or choose another directory") from None
    except OSError as error:
        raise RunError(f"{path}: cannot begin a ledger: {error.strerror}") from None


def append(path: Path, lines: list[dict[str, object]]) -> None:
    """Add lines to a ledger's file.

    Raises:
        RunError: it cannot be written.
    """
    try:
        append_lines(path, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise RunError(f"{path}: cannot write the ledger: {error.strerror}; make room and resume the run") from None
