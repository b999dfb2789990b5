"""Which plan to take within limits, and which limit is in the way of a better one.

Knows plans, limits and an order of preference that it is given; knows no settings and no model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isthmus.planning.plan import Plan


@dataclass(frozen=True)
class Limits:
    """What a run may take at most; None: as much as it likes.

    Attributes:
        edge_memory: bytes of live tensors on the edge.
        max_bytes: that cross in the whole run, both ways, what is fetched included.
        max_hours: of the whole run.
    """

    edge_memory: int | None = None
    max_bytes: int | None = None
    max_hours: float | None = None

    def shares(self, plan: Plan) -> dict[str, float]:
        """How much of each limit a plan takes: over 1 is too much."""
        needs = needs_of(plan)
        return {name: needs[name] / limit for name, limit in self.told().items()}

    def told(self) -> dict[str, float]:
        """The limits there are, by name."""
        every = {"edge_memory": self.edge_memory, "max_bytes": self.max_bytes, "max_hours": self.max_hours}
        return {name: limit for name, limit in every.items() if limit is not None}


def needs_of(plan: Plan) -> dict[str, float]:
    """What a plan takes, by the names of the limits."""
    peak = float(plan.costs.edge_peak_tensor_bytes)
    return {"edge_memory": peak, "max_bytes": plan.total_bytes, "max_hours": plan.hours}


@dataclass(frozen=True)
class Shortage:
    """A limit that is too small by itself.

    Attributes:
        limit: its name.
        times: by how much the least that any plan needs is over it.
        least: the plan that needs the least.
    """

    limit: str
    times: float
    least: Plan


@dataclass(frozen=True)
class Fitted:
    """What a search came to.

    Attributes:
        plan: the one to take; None: none is within the limits.
        binding: limits by the plan that lifting them, one alone, would have let be taken, a better one by the order.
        together: there are better plans, and each breaks more than one limit.
        tried: plans that were looked at.
        shortages: where there is no plan, the limits that no plan keeps.
        nearest: where there is no plan, the one that is over its worst limit by least.
    """

    plan: Plan | None
    binding: dict[str, Plan]
    together: bool
    tried: int
    shortages: tuple[Shortage, ...] = ()
    nearest: Plan | None = None


def fit(tiers: Iterable[Sequence[Plan]], limits: Limits) -> Fitted:
    """Take the best plan that keeps all limits.

    Args:
        tiers: plans by preference, the best tier first; asked for one by one, and no further than needed. Within one,
            more trainable parameters are better, and then fewer seconds.
        limits: to keep.
    """
    passed: list[Plan] = []
    tried = 0
    for tier in tiers:
        ordered = sorted(tier, key=_preference)
        tried += len(ordered)
        chosen = next((plan for plan in ordered if not _broken(plan, limits)), None)
        if chosen is not None:
            passed += ordered[: ordered.index(chosen)]
            return Fitted(chosen, _binding(passed, limits), bool(passed), tried)
        passed += ordered
    return _impossible(passed, limits)


def _preference(plan: Plan) -> tuple[float, float]:
    return -plan.costs.trained.total, plan.total_s


def _broken(plan: Plan, limits: Limits) -> list[str]:
    return [name for name, share in limits.shares(plan).items() if share > 1]


def _binding(better: Iterable[Plan], limits: Limits) -> dict[str, Plan]:
    """The best plan behind each limit that stands alone before it."""
    found: dict[str, Plan] = {}
    for plan in better:
        broken = _broken(plan, limits)
        if len(broken) == 1:
            found.setdefault(broken[0], plan)
    return found


def _impossible(plans: Sequence[Plan], limits: Limits) -> Fitted:
    shortages = []
    for name in limits.told() if plans else ():
        least = min(plans, key=lambda plan: needs_of(plan)[name])
        times = limits.shares(least)[name]
        if times > 1:
            shortages.append(Shortage(name, times, least))
    nearest = min(plans, key=lambda plan: max(limits.shares(plan).values()), default=None)
    return Fitted(None, {}, False, len(plans), tuple(shortages), nearest)
