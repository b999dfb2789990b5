"""Which ports would take part in the steps of a run, before anything is measured.

Knows Kill-and-Revive's own policy and a run's settings; knows no bytes and no model. What only training measures is
taken to be the same at every port: the ports that a run keeps may be others, but as many.
"""

from collections import Counter
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
    """How much of a run's steps each part is, the sum being 1, and how many times a step each set is left idle."""

    parts: Counter[PartOfStep] = field(default_factory=Counter)
    parkings: Counter[frozenset[Site]] = field(default_factory=Counter)

    def add(self, other: "Attendance", times: float) -> None:
        """Take in so many times another."""
        for own, more in ((self.parts, other.parts), (self.parkings, other.parkings)):
            for key, count in more.items():
                own[key] += count * times  # type: ignore[index, assignment]


NOBODY = Attendance(Counter({PartOfStep(frozenset()): 1}))
"""Of a run without ports at which the edge answers."""


def attendance(settings: TrainConfig, adapters: PortAdapters, steps: int) -> Attendance:
    """Who takes part in the steps of a run, on average.

    Raises:
        UsageError: the settings of Kill-and-Revive do not fit the ports or the number of steps.
    """
    everyone = frozenset(adapters.sites)
    if settings.kr_active is None:
        return Attendance(Counter({PartOfStep(everyone): 1}))
    policy = policy_of(settings, adapters, steps)
    followed = min(steps, policy.plan.first + PERIODS * settings.kr_period)
    seen = _Followed(policy, adapters, settings.kr_idle == "park")
    settled = followed - PERIODS * settings.kr_period // 2
    whole, late = Attendance(), Attendance()
    for step in range(followed):
        one = seen.step(step)
        whole.add(one, 1 / steps)
        if step >= settled:
            late.add(one, 1)
    if followed < steps:
        whole.add(late, (steps - followed) / (followed - settled) / steps)
    return whole


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
        left = Counter({self._sites(idle): 1}) if idle and idle != self._idle else Counter[frozenset[Site]]()
        active = self._policy.active(step)
        self._policy.observe(step, dict.fromkeys(active, ALIKE))
        self._moved, self._idle = self._moved | self._policy.alive, idle
        return Attendance(Counter({PartOfStep(self._sites(active), self._sites(idle)): 1}), left)

    def _sites(self, names: frozenset[str]) -> frozenset[Site]:
        return sites_of(self._adapters, names)
