"""The audit log: who did what with which object, how much of it, and how it ended; a line each, chained by hashes.

Knows one file, its earlier pieces and the disk; never a tensor, a text or a path of the edge's. Who calls says what
happened in words that are settled beforehand. A line is with the operating system before the node goes on, so that a
killed process loses none; it is on the disk within `SYNC_S`, so that a power cut may cost a second. A log that cannot
be written lets nothing new begin (`require`); what is under way goes on, and its lines wait.
"""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import threading
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from isthmus.errors import AuditError
from isthmus.trust.chain import LONGEST_LINE, End, line_after, read

log = logging.getLogger(__name__)

SYNC_S: Final = 1.0
PIECE_BYTES: Final = 64 << 20
"""A file of this size is put aside under a number, and the chain goes on in a new one."""

WAITING: Final = 10_000
"""Lines that may wait for a disk; of more, only how many there were is told."""


class Audit:
    """Keeps nothing: what a node without --audit has."""

    def record(
        self, action: str, actor: str, outcome: str = "ok", thing: str = "", **figures: int | float | str
    ) -> None:
        """Write a line.

        Args:
            action: what was done, one of a few words.
            actor: who did it: an identity, as the certificate has it, or `node`.
            outcome: `ok`, or the name of an error of the catalogue.
            thing: what it was done to: a session's or a bundle's name, checked by the caller.
            figures: how much of it; numbers, or words that are settled beforehand.
        """

    def require(self) -> None:
        """Refuse what is about to begin, where it could not be written down.

        Raises:
            AuditError: the log cannot be written.
        """

    @property
    def end(self) -> End | None:
        """The newest line that was written; None where none ever is."""
        return None

    def close(self) -> None:
        """Write no more."""


class AuditLog(Audit):
    """Appends to one file; any thread may record."""

    def __init__(self, path: Path) -> None:
        """Go on with the chain in `path`, or begin one.

        Raises:
            AuditError: the file cannot be written, or its end is not what was written.
        """
        self._path = path
        self._lock = threading.Lock()
        self._waiting: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._closed = threading.Event()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _opened(path)
            self._end, torn = _newest(path)
        except OSError as error:
            raise AuditError(f"--audit: {path} cannot be written ({error.strerror}); name another file") from None
        if self._end == End():
            self.record("begin", "node", thing=secrets.token_hex(8))
        if torn:
            self.record("torn", "node", thing=hashlib.sha256(torn).hexdigest(), bytes=len(torn))
        self.require()
        self._syncing = threading.Thread(target=self._sync, name="audit", daemon=True)
        self._syncing.start()

    def record(
        self, action: str, actor: str, outcome: str = "ok", thing: str = "", **figures: int | float | str
    ) -> None:
        """Write a line; one that the disk refuses waits."""
        said = {"action": action, "actor": actor, "outcome": outcome, "object": thing, **figures}
        said["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            if len(self._waiting) < WAITING:
                self._waiting.append(said)
            else:
                self._lost += 1
            self._write()

    def require(self) -> None:
        """Refuse what is about to begin while lines wait for the disk."""
        with self._lock:
            self._write()
            if self._waiting:
                raise AuditError("the server cannot write its audit log and takes nothing new; tell the model owner")

    @property
    def end(self) -> End | None:
        """The newest line that was written."""
        return self._end

    def close(self) -> None:
        """Sync, and write no more."""
        self._closed.set()
        self._syncing.join()
        os.close(self._file)

    def _write(self) -> None:
        """Write what waits, in order; holds the lock."""
        while self._waiting:
            line, end = line_after(self._end, self._waiting[0])
            if not self._put(line):
                return
            self._end = end
            self._waiting.popleft()
            if not self._waiting and self._lost:
                lost = {"action": "lost", "actor": "node", "outcome": "audit", "object": "", "lines": self._lost}
                self._waiting.append({**lost, "time": datetime.now(UTC).isoformat(timespec="milliseconds")})
                self._lost = 0

    def _put(self, line: bytes) -> bool:
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) == len(line):
                self._turn_over(size + len(line))
                return True
            why = "no space left"
        except OSError as error:
            why = error.strerror or str(error)
        os.ftruncate(self._file, size)  # half a line would stand in the way of the next
        if len(self._waiting) == 1:
            log.error("the audit log %s cannot be written (%s): nothing new is taken until it can", self._path, why)
        return False

    def _turn_over(self, size: int) -> None:
        if size < PIECE_BYTES:
            return
        aside = [int(piece.suffix[1:]) for piece in pieces(self._path) if piece != self._path]
        number = max(aside, default=0) + 1  # whoever took the first away shall not lose the last
        draft = self._path.with_name(f"{self._path.name}.next")
        following = _opened(draft)  # first: where it cannot be, nothing has changed
        try:
            if self._path.exists():  # else it was put aside before, and what follows could not be put in its place
                self._path.rename(self._path.with_name(f"{self._path.name}.{number:06d}"))
            draft.rename(self._path)
        except OSError:
            os.close(following)
            raise
        os.fsync(self._file)
        os.close(self._file)
        self._file = following

    def _sync(self) -> None:
        over, synced = False, End()
        while not over:
            over = self._closed.wait(SYNC_S)
            with self._lock:
                self._write()
                behind, synced = synced != self._end, self._end
                descriptor = os.dup(self._file)
            try:  # without the lock: whoever records does not wait for the disk
                if behind:
                    os.fsync(descriptor)
            except OSError:
                log.exception("the audit log %s cannot be synced", self._path)
            finally:
                os.close(descriptor)


def _opened(path: Path) -> int:
    """The file to append to, which no other node writes.

    Raises:
        OSError: it cannot be opened, or another does.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(errno.EBUSY, "another node writes it") from None
    return descriptor


def pieces(path: Path) -> list[Path]:
    """The files of a log in their order: those that were put aside, then the one that is written."""
    aside = sorted(path.parent.glob(f"{path.name}.[0-9][0-9][0-9][0-9][0-9][0-9]"))
    return [*aside, *([path] if path.exists() else [])]


def _newest(path: Path) -> tuple[End, bytes]:
    """Where the chain in these files stands; and what stood after its last whole line, which is set aside."""
    torn = _cut_torn(path) if path.exists() else b""
    found = [piece for piece in pieces(path) if piece.stat().st_size]
    if not found:
        return End(), torn
    with found[-1].open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_LINE))
        last = file.read().splitlines(keepends=True)[-1:]
    try:
        ((_, end),) = read(last)
    except AuditError:
        raise AuditError(
            f"--audit: the last line of {found[-1]} was changed; look with `cloud_node audit verify {path}`, keep the "
            "file, and name another to go on"
        ) from None
    return end, torn


def _cut_torn(path: Path) -> bytes:
    """Move what stands after the last newline, which a killed write left, to a file beside the log."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - LONGEST_LINE)
        file.seek(start)
        tail = file.read()
        torn = tail[tail.rfind(b"\n") + 1 :]
        if torn:
            path.with_name(f"{path.name}.torn-{secrets.token_hex(4)}").write_bytes(torn)
            file.truncate(size - len(torn))
    return torn
