"""What stood on the disk meanwhile: folders are looked through whenever a file is synced, renamed or removed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LOOKS = ("fsync", "replace", "rename", "unlink", "rmdir")


class Seen:
    """Every content that a file had at any such moment, each once."""

    def __init__(self, folders: tuple[Path, ...]) -> None:
        self._folders = folders
        self._contents: dict[tuple[str, int, int], bytes] = {}

    def look(self) -> None:
        """Look through the folders now."""
        for folder in self._folders:
            for path in folder.rglob("*"):
                try:
                    if path.is_file():
                        found = path.stat()
                        at = (str(path), found.st_ino, found.st_mtime_ns)
                        if at not in self._contents or len(self._contents[at]) != found.st_size:
                            self._contents[at] = path.read_bytes()
                except FileNotFoundError:
                    continue

    @property
    def files(self) -> set[str]:
        """Names of files that were seen."""
        return {Path(name).name for name, _, _ in self._contents}

    def where(self, needle: bytes) -> list[str]:
        """The files that held it at some moment."""
        return sorted({name for (name, _, _), content in self._contents.items() if needle in content})


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> Iterator[Seen]:
    """Look on while in here, before and after each such call."""
    seen = Seen(folders)

    def looking(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            seen.look()
            try:
                return real(*given, **named)
            finally:
                seen.look()

        return call

    with monkeypatch.context() as patched:
        for name in LOOKS:
            patched.setattr(os, name, looking(getattr(os, name)))
        yield seen
    seen.look()
