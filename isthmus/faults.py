"""Points at which a test may have a process kill itself, as a power cut would, instead of hoping to hit them.

Knows names, counts and one signal; knows nothing of what stands around a point. Nothing is armed but by the variable
below, which tests set for a process of theirs; without it a point is one comparison. See docs/endurance.md.
"""

import itertools
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import BinaryIO, NamedTuple

from isthmus.errors import UsageError

VARIABLE = "ISTHMUS_FAULT"
"""`POINT:N` or `POINT`: at the Nth passing, or the first, the process is gone."""


class Fault(StrEnum):
    """Where a process may die."""

    SERVER_BEFORE_COMPUTE = "server-before-compute"
    SERVER_IN_FORWARD = "server-in-forward"
    SERVER_IN_BACKWARD = "server-in-backward"
    SERVER_AFTER_COMPUTE = "server-after-compute"
    SERVER_AFTER_REPLY = "server-after-reply"
    QUOTA_BEFORE_COMMIT = "quota-before-commit"
    QUOTA_AFTER_COMMIT = "quota-after-commit"
    SUBMISSION_HALF_ARRIVED = "submission-half-arrived"
    SUBMISSION_BEFORE_STORE = "submission-before-store"
    SUBMISSION_AFTER_STORE = "submission-after-store"
    OPTIMIZER_BEFORE_STEP = "optimizer-before-step"
    OPTIMIZER_AFTER_STEP = "optimizer-after-step"
    METRICS_WRITTEN = "metrics-written"
    CHECKPOINT_HALF_WRITTEN = "checkpoint-half-written"
    CHECKPOINT_BEFORE_RENAME = "checkpoint-before-rename"
    CHECKPOINT_AFTER_RENAME = "checkpoint-after-rename"
    ADAPTER_BEFORE_RENAME = "adapter-before-rename"
    ADAPTER_AFTER_RENAME = "adapter-after-rename"
    CACHE_HALF_WRITTEN = "cache-half-written"
    CACHE_BEFORE_RENAME = "cache-before-rename"
    FETCH_HALF_ARRIVED = "fetch-half-arrived"
    DISTIL_AFTER_STEP = "distil-after-step"
    FOLDER_BEFORE_RENAME = "folder-before-rename"
    FOLDER_AFTER_RENAME = "folder-after-rename"
    ROUND_BEFORE_SUM = "round-before-sum"
    ROUND_AFTER_SUM = "round-after-sum"
    ROUND_BEFORE_SUBMIT = "round-before-submit"
    ROUND_AFTER_SUBMIT = "round-after-submit"
    ROUND_BEFORE_SAVE = "round-before-save"


class WritePoints(NamedTuple):
    """The points of a file that is written under another name and renamed."""

    half: Fault
    before: Fault
    after: Fault


CHECKPOINT = WritePoints(Fault.CHECKPOINT_HALF_WRITTEN, Fault.CHECKPOINT_BEFORE_RENAME, Fault.CHECKPOINT_AFTER_RENAME)


@dataclass(frozen=True)
class _Armed:
    fault: Fault
    at: int
    passings: "Iterator[int]" = field(default_factory=lambda: itertools.count(1))


_armed: _Armed | None = None


def arm(environment: Mapping[str, str]) -> str | None:
    """Read the variable; the words of a warning, None where it is not set and nothing is armed.

    Raises:
        UsageError: it names no point, or its count is no whole number from 1.
    """
    global _armed
    _armed = None
    given = environment.get(VARIABLE)
    if not given:
        return None
    name, _, count = given.partition(":")
    if name not in set(Fault):
        raise UsageError(f"{VARIABLE} names no point {name!r:.40}; unset it, or use one of {', '.join(Fault)}")
    if count and not (count.isdecimal() and int(count) > 0):
        raise UsageError(f"{VARIABLE} has {count!r:.20} where a count from 1 belongs; use such as {name}:3")
    _armed = _Armed(Fault(name), int(count or 1))
    return f"{VARIABLE} is set: this process kills itself at passing {_armed.at} of {name}; unset it outside tests"


def passing(fault: Fault) -> None:
    """Die here by SIGKILL, if this is the passing that was armed."""
    if _armed is not None and _armed.fault is fault and next(_armed.passings) == _armed.at:
        os.kill(os.getpid(), signal.SIGKILL)


def write_passing(file: BinaryIO, content: bytes, half: Fault) -> None:
    """Write all of `content`, with the point `half` in its middle."""
    if _armed is None or _armed.fault is not half:
        file.write(content)
        return
    view = memoryview(content)
    file.write(view[: len(view) // 2])
    file.flush()
    passing(half)
    file.write(view[len(view) // 2 :])
