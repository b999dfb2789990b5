"""The policy that holds now: read from its file, and again when that changes.

Knows the file and what must be at hand to go by it: the record of daily budgets, and how large hidden states may be.
Knows no peer and no call.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from cloud_node.policy.rules import Policy, Rights, read_policy
from cloud_node.policy.usage import Usage
from isthmus.cut import Cut
from isthmus.errors import UsageError

log = logging.getLogger(__name__)

ALL: Final = Rights(
    models=["*"], methods=["*"], exchanges=["*"], cuts=["*"], emulators=["*"], submit=True, rounds=["*"]
)
LOOK_EVERY_S: Final = 1.0


class InForce:
    """A policy, and what it needs.

    Attributes:
        file: where it stands; None: there is none, and everybody may do everything.
        policy: what holds.
        usage: the record of daily budgets, where there are any.
        bounds: of each cut, the largest value that a hidden state may hold; none where that is not judged.
    """

    def __init__(self, file: Path | None, largest: Callable[[], Mapping[Cut, float]]) -> None:
        """Read a policy; `largest` finds the largest value that the model itself makes at each cut.

        Raises:
            UsageError: the file does not hold a policy, or budgets cannot be remembered.
        """
        self.file = file
        self.policy = Policy(default=ALL, hidden_margin=0.0)
        self.usage: Usage | None = None
        self.bounds: Mapping[Cut, float] = {}
        self._largest = largest
        self._found: Mapping[Cut, float] | None = None
        self._seen = self._stamp()
        if file is not None:
            self._take(read_policy(file))

    def in_words(self) -> str:
        """What holds, for the log."""
        if self.file is None:
            return "no --policy: every identity of the authority may do all that is offered here"
        rest = "others are refused" if self.policy.default is None else "others have the default"
        return f"policy {self.file}: {len(self.policy.tenants)} tenants named, {rest}"

    def reload(self) -> bool:
        """Read the file again if it changed; whether something else holds now. A broken one is told of in the log."""
        stamp = self._stamp()
        if self.file is None or stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self._take(read_policy(self.file))
        except UsageError as error:
            log.warning("the policy was changed and cannot be taken, the old one holds: %s", error)
            return False
        log.info("%s", self.in_words())
        return True

    async def follow(self, changed: Callable[[], None]) -> None:
        """Look for changes until cancelled, and tell of them."""
        while self.file is not None:
            await asyncio.sleep(LOOK_EVERY_S)
            if await asyncio.to_thread(self.reload):
                changed()

    def _take(self, policy: Policy) -> None:
        if self.usage is None and policy.counts_days and self.file is not None:
            self.usage = Usage(self.file.parent / (policy.usage or f"{self.file.name}.usage"))
        if policy.hidden_margin and self._found is None:
            self._found = self._largest()
        found = (self._found or {}) if policy.hidden_margin else {}
        self.bounds = {cut: policy.hidden_margin * largest for cut, largest in found.items()}
        self.policy = policy

    def _stamp(self) -> tuple[int, ...]:
        try:
            about = self.file.stat() if self.file is not None else None
        except OSError:
            return ()
        return (about.st_mtime_ns, about.st_size, about.st_ino) if about is not None else ()
