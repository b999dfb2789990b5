"""Which methods are killed at which points: all pairs in `make kills`, some of each in `make test`."""

import os
from collections.abc import Mapping
from typing import Any

from isthmus.faults import Fault

STEPS, CHECKPOINT_EVERY = 6, 2
EVERYTHING = os.environ.get("ISTHMUS_KILLS") == "all"

METHODS: Mapping[str, Mapping[str, Any]] = {
    "split": {},
    "four microbatches": {"microbatches": 4},
    "top": {"train": "top"},
    "side": {"method": "side", "tap_width": 8, "tap_every": 2},
    "dlora": {"method": "dlora"},
    "parameters": {"method": "dlora", "exchange": "parameters", "microbatches": 2},
    "kill-and-revive": {"method": "dlora", "kr_active": 0.25, "kr_warmup": 2, "kr_period": 2},
    "core": {"method": "dlora", "exchange": "core", "rank": 4},
    "offsite": {"method": "offsite", "server": None},
    "local": {"method": "local", "server": None},
}
FORWARD_ONLY = ("top", "side")
ALONE = ("offsite", "local")
"""Methods that train without a server."""

SERVER = (
    Fault.SERVER_BEFORE_COMPUTE,
    Fault.SERVER_IN_FORWARD,
    Fault.SERVER_IN_BACKWARD,
    Fault.SERVER_AFTER_COMPUTE,
    Fault.SERVER_AFTER_REPLY,
)
EDGE = (
    Fault.OPTIMIZER_BEFORE_STEP,
    Fault.OPTIMIZER_AFTER_STEP,
    Fault.METRICS_WRITTEN,
    Fault.CHECKPOINT_HALF_WRITTEN,
    Fault.CHECKPOINT_BEFORE_RENAME,
    Fault.CHECKPOINT_AFTER_RENAME,
    Fault.ADAPTER_BEFORE_RENAME,
    Fault.ADAPTER_AFTER_RENAME,
)
CACHE = (Fault.CACHE_HALF_WRITTEN, Fault.CACHE_BEFORE_RENAME)
ONCE = (Fault.ADAPTER_BEFORE_RENAME, Fault.ADAPTER_AFTER_RENAME)
"""Points that a run passes once."""

USUALLY: Mapping[str, tuple[Fault, ...]] = {
    "split": (*SERVER, *(fault for fault in EDGE if fault is not Fault.METRICS_WRITTEN)),
    "four microbatches": (),
    "top": (Fault.CACHE_HALF_WRITTEN,),
    "side": (Fault.SERVER_BEFORE_COMPUTE, Fault.CACHE_BEFORE_RENAME),
    "dlora": (Fault.SERVER_IN_FORWARD, Fault.CHECKPOINT_BEFORE_RENAME),
    "parameters": (Fault.SERVER_AFTER_COMPUTE, Fault.SERVER_IN_BACKWARD),
    "kill-and-revive": (Fault.SERVER_IN_BACKWARD, Fault.OPTIMIZER_AFTER_STEP),
    "core": (Fault.SERVER_IN_BACKWARD, Fault.CHECKPOINT_AFTER_RENAME),
    "offsite": (Fault.CHECKPOINT_HALF_WRITTEN,),
    "local": (Fault.OPTIMIZER_AFTER_STEP,),
}
"""What `make test` takes of each method."""


def pairs(points: tuple[Fault, ...]) -> list[tuple[str, str]]:
    """Methods and, of these points, those that concern each."""
    return [
        (method, str(fault))
        for method in METHODS
        for fault in points
        if concerns(method, fault) and (EVERYTHING or fault in USUALLY[method])
    ]


def concerns(method: str, fault: Fault) -> bool:
    """Whether a run of the method ever passes the point."""
    if fault in CACHE:
        return method in FORWARD_ONLY
    if fault in SERVER and method in ALONE:
        return False
    return not (fault is Fault.SERVER_IN_BACKWARD and method in FORWARD_ONLY)


def armed(fault: str, method: str) -> str:
    """At its second passing where there is one for certain, so that something was done before.

    What trains forward only has all its requests on the way at once, and a server may join them into one pass.
    """
    return fault if fault in ONCE or (fault in SERVER and method in FORWARD_ONLY) else f"{fault}:2"
