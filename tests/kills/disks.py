"""Disks that are small, full or read-only, mounted where the machine lets us.

Knows mounts and files; a machine that mounts nothing skips whoever asks, and says so.
"""

import errno
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096
MOUNT, UMOUNT = shutil.which("mount") or "mount", shutil.which("umount") or "umount"


class Disk:
    """A file system of its own at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / ".filler"

    def fill(self, leaving: int = 0) -> None:
        """Take all room but `leaving` pages."""
        with self._filler.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(PAGE))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            file.truncate(max(0, file.tell() // PAGE - leaving) * PAGE)

    def clear(self) -> None:
        """Give the room back."""
        self._filler.unlink()

    def read_only(self, yes: bool = True) -> None:
        """Let nobody write, root included; or again."""
        subprocess.run([MOUNT, "-o", f"remount,{'ro' if yes else 'rw'}", self.path], check=True)


@contextmanager
def disk(path: Path, size: int) -> Iterator[Disk]:
    """A file system of `size` bytes in memory, mounted at `path` while in here."""
    path.mkdir(parents=True)
    mounted = subprocess.run([MOUNT, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run([UMOUNT, "-l", path], check=True)
