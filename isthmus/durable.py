"""Files that are there whole or not at all, even when the power fails.

Knows the file system; knows nothing of what is written.
"""

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

DRAFT = ".tmp"
"""Ending of a file that is still being written; one that a crash leaves behind means nothing."""


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, sync, rename into place, sync the directory.

    Raises:
        OSError: the disk refuses; what stood at `path` still does.
    """
    write_pieces(path, (content,))


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """As `write_whole`, of a content that comes in pieces.

    Raises:
        OSError: as `write_whole`.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}{DRAFT}")
    try:
        with draft.open("xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or a directory's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
