"""A folder that appears whole or not at all, where there was none or an empty one.

Knows paths, locks and one signal; knows nothing of what is written into a folder.
"""

import fcntl
import glob
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from isthmus.durable import DRAFT, sync
from isthmus.errors import UsageError
from isthmus.faults import Fault, passing

LOCK, WHOLE = "lock", "whole"
"""In a draft: what its process holds for as long as it lives, and then the folder that is written into."""


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
    """A folder to write into, which becomes `out` at the end, durably; if anything is raised in here, nothing is left.

    SIGTERM raises in here too. What a process that was killed has left of the same `out` is removed first.

    Raises:
        OSError: it cannot be made or moved.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(out)
    with (
        _unwinding(),
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", suffix=DRAFT, dir=out.parent) as draft,
        (Path(draft) / LOCK).open("xb") as lock,
    ):
        with suppress(OSError):  # of a file system without locks: there nothing that is left can be told apart
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = Path(draft) / WHOLE
        folder.mkdir()
        yield folder
        for path in (*folder.rglob("*"), folder):
            sync(path)
        passing(Fault.FOLDER_BEFORE_RENAME)
        folder.rename(out)
        passing(Fault.FOLDER_AFTER_RENAME)
    sync(out.parent)


def _remove_left(out: Path) -> None:
    """Remove drafts whose lock nobody holds: the process is gone."""
    for path in out.parent.glob(f".{glob.escape(out.name)}-*{DRAFT}/{WHOLE}"):
        with suppress(OSError), (path.parent / LOCK).open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent)


@contextmanager
def _unwinding() -> Iterator[None]:
    """Let SIGTERM raise, where nobody else has a use for it."""

    def leave(signum: int, _: FrameType | None) -> NoReturn:
        signal.signal(signum, signal.SIG_IGN)  # or a second one would stop the cleaning up
        raise SystemExit(128 + signum)

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    try:
        signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: the host program handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
