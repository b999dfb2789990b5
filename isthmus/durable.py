"""Files that are there whole or not at all, even when the power fails.

Knows the file system; knows nothing of what is written.
"""

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from isthmus.faults import WritePoints, passing, write_passing

DRAFT = ".tmp"
"""Ending of a file that is still being written; one that a crash leaves behind means nothing."""


def write_whole(path: Path, content: bytes, points: WritePoints | None = None, mode: int = 0o666) -> None:
    """Write under a temporary name, sync, rename into place, sync the directory; tests may kill it at `points`.

    `mode` is the file's, less the umask.

    Raises:
        OSError: the disk refuses; what stood at `path` still does.
    """
    write_pieces(path, (content,), points, mode)


def write_pieces(path: Path, pieces: Iterable[bytes], points: WritePoints | None = None, mode: int = 0o666) -> None:
    """As `write_whole`, of a content that comes in pieces.

    Raises:
        OSError: as `write_whole`.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}{DRAFT}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            if points is None:
                file.writelines(pieces)
            else:
                write_passing(file, b"".join(pieces), points.half)
            file.flush()
            os.fsync(file.fileno())
        if points is not None:
            passing(points.before)
        draft.replace(path)
        if points is not None:
            passing(points.after)
    except BaseException:  # also what makes the pieces may end
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append_lines(path: Path, lines: str) -> None:
    """Add whole lines to a file, or none: what a full disk took of them is cut off again.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before, rest = os.fstat(descriptor).st_size, memoryview(lines.encode())
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Make a file's content, or a directory's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
