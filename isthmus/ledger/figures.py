"""What a ledger counts: the names of phases, figures, peaks and places, and which values they may have.

Knows names and limits; keeps no account.
"""

import math
import operator
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias, get_args

RunPhase: TypeAlias = Literal["fetch", "train", "eval", "generate", "submit", "control"]
"""What a run was doing when it spent something.

`submit` is handing its adapter in; `control` is what serves no single phase, such as heartbeats.
"""

Stage: TypeAlias = Literal["look", "build", "distil", "measure", "plug-in", "score", "rounds"]
"""Beside a run's phases, what Offsite-Tuning has, on the edge `look`, at the owner's the others; and `rounds`, in which
an edge averages with others."""

Phase: TypeAlias = RunPhase | Stage

PHASES: Final[tuple[RunPhase, ...]] = get_args(RunPhase)

EVERY_PHASE: Final[tuple[Phase, ...]] = (*PHASES, *get_args(Stage))

COUNTS: Final[Mapping[str, str]] = {
    "up_bytes": "edge to cloud, as serialised, gRPC's 5-byte prefix included",
    "down_bytes": "cloud to edge, as serialised, gRPC's 5-byte prefix included",
    "up_payload_bytes": "of up_bytes: encoded tensors or bundle files",
    "down_payload_bytes": "of down_bytes: encoded tensors or bundle files",
    "round_trips": "requests answered, and questions at ports",
    "resent_bytes": "of up_bytes: sent again, after a lost connection or because the cloud had not kept an activation",
    "recomputed_calls": "backwards for which the cloud ran its forward again",
    "cached_rows": "rows whose span output came from the edge's cache",
    "fetched_rows": "rows whose span output came over the wire and into the cache",
    "real_tokens": "tokens of the data",
    "padded_tokens": "positions computed on the edge, padding included",
    "edge_forward_flops": "floating-point operations",
    "edge_backward_flops": "floating-point operations",
    "cloud_forward_flops": "floating-point operations, recomputation included",
    "cloud_backward_flops": "floating-point operations",
    "cloud_recompute_flops": "of cloud_forward_flops: forwards run again for a backward",
}
"""Figures counted in whole numbers."""

SECONDS: Final[Mapping[str, str]] = {
    "edge_forward_s": "computing forwards on the edge",
    "edge_backward_s": "computing backwards on the edge",
    "edge_wait_s": "the edge waiting for the cloud",
    "edge_update_s": "what follows a step's gradients on the edge: the optimizer, and the choice of ports",
    "cloud_forward_s": "computing forwards on the cloud",
    "cloud_backward_s": "computing backwards on the cloud",
    "cloud_update_s": "the owner changing weights: filling an emulator's forms, distilling it, plugging ends in",
    "cloud_queue_s": "requests waiting on the cloud for their turn",
    "cloud_port_s": "requests waiting on the cloud for the edge at ports",
}
"""Figures in seconds."""

FIGURES: Final = frozenset((*COUNTS, *SECONDS))

PEAKS: Final = frozenset(
    f"{side}_peak_{kind}_bytes" for side in ("edge", "cloud") for kind in ("tensor", "memory")
)  # tensor: live tensors; memory: the process's high-water mark

_PLACE: Final = re.compile(r"(0|[1-9]\d*)(\.\w+)*", re.ASCII)


def known_phase(name: object) -> Phase:
    """The phase of this name.

    Raises:
        ValueError: there is none.
    """
    if name in EVERY_PHASE:
        return name
    raise ValueError(f"unknown phase {name!r}; known: {', '.join(EVERY_PHASE)}")


def known_place(at: object) -> str:
    """A block's number, or the name of a module in one.

    Raises:
        ValueError: it has another form.
    """
    if not isinstance(at, str) or not _is_place(at):
        raise ValueError(f"{at!r} is no place; name a block, such as '12', or a module in one, '12.self_attn.q_proj'")
    return at


@lru_cache(maxsize=4096)  # a run adds at the same few places, several times a step
def _is_place(at: str) -> bool:
    return _PLACE.fullmatch(at) is not None


def an_object(name: str, value: object) -> dict[str, Any]:
    """A value that is an object of JSON.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")  # noqa: TRY004 - one kind of error for all that a file may hold
    return value


def a_figure(name: str, value: object) -> float:
    """A value that a figure may have: an int for what is counted, a float for seconds.

    Raises:
        ValueError: there is no such figure, or the value is out of its limits.
    """
    if name in COUNTS:
        return whole(name, value)
    if name not in SECONDS:
        raise ValueError(unknown_figure(name))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is in seconds of at least 0, not {value!r}")
    return float(value)


def whole(name: str, value: object) -> int:
    """A value that is a whole number of at least 0.

    Raises:
        ValueError: it is something else.
    """
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"{name} is a whole number of at least 0, not {value!r}")
    return count


def unknown_figure(figure: str) -> str:
    """What to say of a figure that there is not."""
    return f"unknown figure {figure!r}; known: {', '.join(sorted(FIGURES))}"
