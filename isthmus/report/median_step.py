"""Where each second of a training step went, on both sides: of the step that took the median time.

Knows the ledger's seconds and what they are parts of; draws nothing. Seconds are sums over the microbatches of a step:
where several were in flight at once, a side's are more than the clock's.
"""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from isthmus.report.history import Figures, History

Kind: TypeAlias = Literal["forward", "backward", "update", "ports", "cloud", "queue", "link", "rest"]

LABELS: Final[dict[Kind, str]] = {
    "forward": "computing forward",
    "backward": "computing backward",
    "update": "updating what trains",
    "cloud": "waiting while the cloud computes",
    "queue": "waiting for a turn on the cloud",
    "ports": "waiting for the edge at ports",
    "link": "waiting for the link",
    "rest": "something else, or nothing of this step",
}
"""Every way to spend a second, in the order in which they are shown."""


@dataclass(frozen=True)
class Part:
    """Seconds of one kind."""

    kind: Kind
    seconds: float


@dataclass(frozen=True)
class MedianStep:
    """One step.

    Attributes:
        step: its number.
        seconds: by the clock; None: the metrics do not tell.
        edge, cloud: what either side did, in the order of `LABELS`; the cloud's are empty where it had no part.
    """

    step: int
    seconds: float | None
    edge: tuple[Part, ...]
    cloud: tuple[Part, ...]


def median_step(history: History) -> MedianStep | None:
    """The step of median time, the earlier of two; None where no step left a line in the ledger."""
    clock = history.seconds
    took = {step: clock.get(step, _edge_seconds(spent.figures)) for step, spent in history.steps.items()}
    if not took:
        return None
    timed = {step: took[step] for step in took.keys() & clock.keys()} or took
    ranked = sorted(timed, key=lambda step: (timed[step], step))
    step = ranked[(len(ranked) - 1) // 2]
    figures, seconds = history.steps[step].figures, clock.get(step)
    return MedianStep(step, seconds, _edge(figures, seconds), _cloud(figures, seconds))


def _edge(figures: Figures, seconds: float | None) -> tuple[Part, ...]:
    """Of the edge's waiting, the cloud's own seconds come first; what they do not explain is the link."""
    left = figures.get("edge_wait_s", 0.0)
    computing = min(left, figures.get("cloud_forward_s", 0.0) + figures.get("cloud_backward_s", 0.0))
    queue = min(left - computing, figures.get("cloud_queue_s", 0.0))
    return _parts(
        {
            "forward": figures.get("edge_forward_s", 0.0),
            "backward": figures.get("edge_backward_s", 0.0),
            "update": figures.get("edge_update_s", 0.0),
            "cloud": computing,
            "queue": queue,
            "link": left - computing - queue,
        },
        seconds,
    )


def _cloud(figures: Figures, seconds: float | None) -> tuple[Part, ...]:
    spent: dict[Kind, float] = {
        "forward": figures.get("cloud_forward_s", 0.0),
        "backward": figures.get("cloud_backward_s", 0.0),
        "queue": figures.get("cloud_queue_s", 0.0),
        "ports": figures.get("cloud_port_s", 0.0),
    }
    return _parts(spent, seconds) if any(spent.values()) else ()


def _parts(spent: dict[Kind, float], seconds: float | None) -> tuple[Part, ...]:
    if seconds is not None:
        spent = {**spent, "rest": max(0.0, seconds - sum(spent.values()))}
    return tuple(Part(kind, spent[kind]) for kind in LABELS if spent.get(kind))


def _edge_seconds(figures: Figures) -> float:
    return sum(value for name, value in figures.items() if name.startswith("edge_") and name.endswith("_s"))
