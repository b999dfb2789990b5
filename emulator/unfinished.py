"""The hidden folder beside an emulator's own in which a build keeps its distillation until the emulator is there.

Knows paths and a build's settings, which it writes beside the checkpoints; knows nothing of what checkpoints hold.
"""

import glob
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.durable import write_whole
from isthmus.errors import InterruptedRunError, RunError, UsageError

SETTINGS = "settings.json"

OPAQUE = ("model", "text", "distill")
"""Settings that are digests, which would tell a reader nothing."""


@dataclass(frozen=True)
class Unfinished:
    """Of the build of `out` that has these settings: `folder`, which may be there."""

    out: Path
    folder: Path
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, out: Path, made_of: str, settings: Mapping[str, Any]) -> "Unfinished":
        """Name the folder after `made_of`, the digest of all that decides the bundle; `settings` are JSON."""
        return cls(out, out.parent / f".{out.name}-{made_of[:8]}", settings)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.folder.glob("step-*.safetensors"))

    def check(self, resume: bool, console: Console) -> None:
        """Return if the build may begin, or with `resume` go on.

        Raises:
            UsageError: it was begun before and is not resumed, or one with other settings was, which are named.
        """
        if self.folder.exists():
            if not resume:
                raise UsageError(
                    f"this build was begun before: go on with --resume, or remove {self.folder} to begin anew"
                )
            return
        pattern = f".{glob.escape(self.out.name)}-{8 * '[0-9a-f]'}"
        for other in sorted(self.out.parent.glob(pattern)):
            differences = self._differences(other)
            raise UsageError(
                f"an unfinished build of {self.out} with other settings is kept in {other} ({differences}): "
                "give its settings and --resume to go on with it, or remove that folder to discard it"
            )
        if resume:
            console.print("there is nothing to resume: the build begins", highlight=False)

    def begin(self) -> None:
        """Make the folder and write down whose it is.

        Raises:
            RunError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / SETTINGS, json.dumps(self.settings, indent=1).encode())
        except OSError as error:
            raise RunError(f"{self.folder} cannot be written ({error.strerror}): make room for checkpoints") from None

    def remove(self) -> None:
        """Remove the folder, if it is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def told_if_interrupted(self) -> Iterator[None]:
        """Turn Ctrl-C in here into an error that says what is kept and how to go on.

        Raises:
            InterruptedRunError: the user stopped.
        """
        try:
            yield
        except KeyboardInterrupt:
            told = "nothing is kept: the same command begins anew"
            if self.has_checkpoint:
                told = f"what was distilled is kept in {self.folder}: go on with the same command and --resume"
            raise InterruptedRunError(f"interrupted; {told}") from None

    def _differences(self, other: Path) -> str:
        """Which settings another unfinished build has, as flags; each with its own value and that of this one."""
        try:
            theirs = json.loads((other / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "which ones is not written there"
        differing = [name for name, mine in self.settings.items() if theirs.get(name) != mine]
        return "; ".join(_difference(name, theirs.get(name), self.settings[name]) for name in differing)


def _difference(name: str, theirs: Any, mine: Any) -> str:
    if name in OPAQUE:
        return f"another --{name}" if theirs and mine else f"{'a' if theirs else 'no'} --{name} there"
    flag = "computed with" if name == "runtime" else f"--{name}"
    there, here = ("none" if value is None else value for value in (theirs, mine))
    return f"{flag} {there} there and {here} here"
