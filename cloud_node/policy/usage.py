"""What tenants have used of their daily budgets, in a file that a killed node leaves whole.

Knows tenants, requests by a key, tokens and the date in UTC; knows no policy and no session. A request is charged once
a day however often it comes: its key is remembered until midnight.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Final

from isthmus.errors import LimitError, UsageError
from isthmus.faults import Fault, passing

log = logging.getLogger(__name__)

DAY_S: Final = 86400

AGAIN_S: Final = 30.0
"""When to come again where the disk refuses."""

TABLES: Final = """
PRAGMA journal_mode=WAL;
PRAGMA synchronous=NORMAL;
CREATE TABLE IF NOT EXISTS used (day INTEGER, tenant TEXT, tokens INTEGER NOT NULL, PRIMARY KEY (day, tenant));
CREATE TABLE IF NOT EXISTS charged (day INTEGER, tenant TEXT, key BLOB, PRIMARY KEY (day, tenant, key)) WITHOUT ROWID;
"""


class Usage:
    """The daily budgets' record; any thread may use it."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        """Open a record, or begin one.

        Raises:
            UsageError: the file cannot be written, or is none of these.
        """
        self._clock, self._lock = clock, Lock()
        try:
            self._base = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
            self._base.executescript(TABLES)
        except sqlite3.Error as error:
            why = f"the record of daily budgets {file} cannot be kept ({error})"
            raise UsageError(f"{why}; name a file that can be written as `usage:` in the policy") from None

    def used(self, tenant: str) -> int:
        """Tokens that a tenant was charged since midnight."""
        found = self._base.execute("SELECT tokens FROM used WHERE day=? AND tenant=?", (self._day, tenant)).fetchone()
        return int(found[0]) if found else 0

    def require(self, tenant: str, key: bytes, tokens: int, most: int) -> None:
        """See that a request is paid for, or could be.

        Raises:
            LimitError: it would be too much today; after midnight it would be taken, unless no day has room for it.
        """
        with self._lock, _in_words():
            if not self._is_charged(tenant, key):
                self._require_room(tenant, tokens, most)

    def charge(self, tenant: str, key: bytes, tokens: int, most: int) -> int:
        """Charge a request of `tokens` tokens to a tenant that may use `most` a day; returns what this added.

        Raises:
            LimitError: as `require`.
        """
        with self._lock, _in_words():
            if self._is_charged(tenant, key):
                return 0
            self._require_room(tenant, tokens, most)
            self._write(tenant, key, tokens)
            return tokens

    def close(self) -> None:
        """Let the file go."""
        self._base.close()

    @property
    def _day(self) -> int:
        return int(self._clock()) // DAY_S

    def _is_charged(self, tenant: str, key: bytes) -> bool:
        found = self._base.execute(
            "SELECT 1 FROM charged WHERE day=? AND tenant=? AND key=?", (self._day, tenant, key)
        ).fetchone()
        return found is not None

    def _require_room(self, tenant: str, tokens: int, most: int) -> None:
        if tokens > most:
            raise LimitError(f"a request of {tokens:,} tokens; {tenant} has {most:,} a day: send smaller ones")
        used = self.used(tenant)
        if used + tokens > most:
            left_s = DAY_S - self._clock() % DAY_S
            raise LimitError(
                f"{tenant} has used {used:,} of its {most:,} tokens of this day; go on after midnight UTC", left_s
            )

    def _write(self, tenant: str, key: bytes, tokens: int) -> None:
        day = self._day
        self._base.execute("BEGIN IMMEDIATE")
        try:
            self._base.execute("DELETE FROM charged WHERE day<?", (day,))
            self._base.execute("INSERT INTO charged VALUES (?, ?, ?)", (day, tenant, key))
            self._base.execute(
                "INSERT INTO used VALUES (?1, ?2, ?3) ON CONFLICT (day, tenant) DO UPDATE SET tokens = tokens + ?3",
                (day, tenant, tokens),
            )
            passing(Fault.QUOTA_BEFORE_COMMIT)
            self._base.execute("COMMIT")
            passing(Fault.QUOTA_AFTER_COMMIT)
        except sqlite3.Error:
            if self._base.in_transaction:
                self._base.execute("ROLLBACK")
            raise


@contextmanager
def _in_words() -> Iterator[None]:
    """What is not written down is not given away."""
    try:
        yield
    except sqlite3.Error as error:
        log.warning("the record of daily budgets cannot be written (%s): make room on its disk", error)
        raise LimitError("the node cannot write down what is used; tell the model owner", AGAIN_S) from None
