"""Which ports would take part in the steps of a run, before anything is measured.

Knows Kill-and-Revive's own policy and a run's settings; knows no bytes and no model. What only training measures is
taken to be the same at every port: the ports that a run keeps may be others, but as many.
"""

from dataclasses import dataclass, field

from edge_client.config import TrainConfig
from edge_client.kill_revive import KillRevive, Signal
from edge_client.port_adapters import PortAdapters
from edge_client.taking_part import policy_of, sites_of
from isthmus.linears import Site

PERIODS = 12
"""Between decisions that are followed one by one; later ones are taken to be as the latter half of these."""

ALIKE = Signal(change=0.0, step=1.0, norm=1.0)


@dataclass(frozen=True)
class PartOfStep:
    """Who takes part in a step: ports where the edge answers, and those whose adapters were left with the cloud."""

    active: frozenset[Site]
    parked: frozenset[Site] = frozenset()


@dataclass
class Attendance:
    """How many steps have each part, and before how many of them each set of ports is left idle."""

    parts: dict[PartOfStep, float] = field(default_factory=dict)
    parkings: dict[frozenset[Site], float] = field(default_factory=dict)

    def add(self, other: "Attendance", times: float = 1) -> None:
        """Take in so many times another."""
        for part, count in other.parts.items():
            self.parts[part] = self.parts.get(part, 0) + count * times
        for sites, count in other.parkings.items():
            self.parkings[sites] = self.parkings.get(sites, 0) + count * times

    @property
    def usual(self) -> PartOfStep:
        """The part that most steps have."""
        return max(self.parts, key=lambda part: self.parts[part])

    def per_step(self) -> "Attendance":
        """The same of one step, on average."""
        steps = sum(self.parts.values())
        parts = {part: count / steps for part, count in self.parts.items()}
        return Attendance(parts, {sites: count / steps for sites, count in self.parkings.items()})


NOBODY = Attendance({PartOfStep(frozenset()): 1})
"""Of a run without ports at which the edge answers."""


def attendance(settings: TrainConfig, adapters: PortAdapters, steps: int) -> Attendance:
    """Who takes part in the steps of a run, on average.

    Raises:
        UsageError: the settings of Kill-and-Revive do not fit the ports or the number of steps.
    """
    everyone = frozenset(adapters.sites)
    if settings.kr_active is None:
        return Attendance({PartOfStep(everyone): 1})
    policy = policy_of(settings, adapters, steps)
    followed = min(steps, policy.plan.first + PERIODS * settings.kr_period)
    seen = _Followed(policy, adapters, settings.kr_idle == "park")
    settled = followed - PERIODS * settings.kr_period // 2
    whole, late = Attendance(), Attendance()
    for step in range(followed):
        one = seen.step(step)
        whole.add(one)
        if step >= settled:
            late.add(one)
    if followed < steps:
        whole.add(late, (steps - followed) / (followed - settled))
    return whole.per_step()


class _Followed:
    """A policy in a run whose ports all measure the same."""

    def __init__(self, policy: KillRevive, adapters: PortAdapters, parks: bool) -> None:
        self._policy, self._adapters, self._parks = policy, adapters, parks
        self._moved: frozenset[str] = frozenset()
        self._idle: frozenset[str] = frozenset()

    def step(self, step: int) -> Attendance:
        """Who takes part in it, and what was left idle before it; call it for each in order."""
        self._policy.decide(step)
        idle = self._moved - self._policy.alive if self._parks else frozenset()
        left = {self._sites(idle): 1.0} if idle and idle != self._idle else {}
        active = self._policy.active(step)
        self._policy.observe(step, dict.fromkeys(active, ALIKE))
        self._moved, self._idle = self._moved | self._policy.alive, idle
        return Attendance({PartOfStep(self._sites(active), self._sites(idle)): 1}, left)

    def _sites(self, names: frozenset[str]) -> frozenset[Site]:
        return sites_of(self._adapters, names)
