"""Lines of text in a file that grows, each sealed by itself under its place: the answers of a sealed run.

Knows lines and a seal; knows nothing of what a line says. A line that was changed, or stands in another's place or
file, does not open; that the last lines are missing cannot be seen, as in any file that is still being written.
"""

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

from edge_client.runs import RunDirectory
from isthmus.durable import write_whole
from isthmus.errors import BundleError, RunError
from isthmus.trust.sealing import Seal


@dataclass(frozen=True)
class SealedLines:
    """How lines of a file are sealed and opened; `path` is the file, whose name they are bound to."""

    path: Path
    seal: Seal

    def closed(self, index: int, line: str) -> str:
        """What stands in the file for a line (0 is the first)."""
        return base64.b64encode(b"".join(self.seal.sealed(self._purpose(index), [line.encode()]))).decode()

    def opened(self, index: int, stored: str) -> str:
        """The line that was sealed.

        Raises:
            BundleError: it was changed, or is another's.
        """
        try:
            content = base64.b64decode(stored, validate=True)
        except (binascii.Error, ValueError):
            raise BundleError(f"{self.path}:{index + 1} is no sealed line; restore it") from None
        return self.seal.opened(content, self.path, self._purpose(index)).decode()

    def _purpose(self, index: int) -> str:
        return f"answers/{self.path.name}/{index}"


def unseal_answers(run: Path, answers: Path, out: Path, key_file: Path | None) -> int:
    """Write a sealed run's answers as they would be without a seal; returns how many there are.

    Raises:
        RunError: the run is not sealed or something else opens it, or `answers` cannot be read or `out` be written.
        BundleError: a line was changed, or is of another run, file or place.
        UsageError: what opens the run was not given.
    """
    directory = RunDirectory(run)
    directory.unlock(key_file or directory.config().key_file)
    if directory.seal is None:
        raise RunError(f"{run} is not sealed: its answers are as they are")
    if out.exists():
        raise RunError(f"{out} is there already; choose another --out")
    sealed = SealedLines(answers, directory.seal)
    try:
        stored = answers.read_text(encoding="ascii", errors="replace").split("\n")[:-1]  # a torn last line is none
        lines = [sealed.opened(index, line) for index, line in enumerate(stored)]
        write_whole(out, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise RunError(f"{error.filename or out} cannot be used ({error.strerror}); check the path") from None
    return len(lines)
