"""A folder that appears whole or not at all, where there was none or an empty one.

Knows paths; knows nothing of what is written into a folder.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.durable import sync
from isthmus.errors import UsageError


def is_free(out: Path) -> bool:
    """Whether a folder may be written to `out`: it is absent, or an empty folder."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def refuse_taken(out: Path) -> None:
    """Return if a folder may be written to `out`.

    Raises:
        UsageError: it is not absent and no empty folder.
    """
    if not is_free(out):
        raise UsageError(f"{out} exists and holds something; remove it, or name another folder with --out")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; if anything is raised in here, nothing is left.

    Raises:
        OSError: it cannot be made or moved.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "whole"
        folder.mkdir()
        yield folder
        folder.rename(out)
    sync(out.parent)
