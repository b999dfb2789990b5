"""Kill-and-Revive: which few of a run's ports are worth their traffic, decided anew every few steps.

Knows ports by name, what they cost, and numbers measured at steps; knows no model, no tensors, no wire and no files.

After DLoRA (Gao and Zhang, 2024, arXiv 2404.05182). The paper's exact criterion is not public: this is our own reading.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import numpy as np

from isthmus.errors import RunError, UsageError

Criterion = Literal["importance", "gradient", "random", "top"]

ROUND_TRIP_VALUES = 256
"""The price of one round trip, in values a token: what a link could carry while the span waits for the edge."""

ROUNDING = 1e-9
"""Of a share times a count: 0.3 of 10 are 3."""

DECAY = 0.5
"""The part of a port's score that one more measurement leaves of the earlier ones."""

FADE = 0.9
"""What a decision leaves of a score that nothing has confirmed since the decision before."""


@dataclass(frozen=True)
class PortShape:
    """What a port costs.

    Attributes:
        block: its block's number.
        group: ports of a block with the same group share one input, hence one round trip in each pass.
        own: values a token that cross for this port alone, both passes together.
        shared: values a token that cross once for its whole group, both passes together.
    """

    block: int
    group: str
    own: int
    shared: int


@dataclass(frozen=True)
class Signal:
    """What one step measured at a port.

    Attributes:
        change: |g·Δw|, nats: what the module's change so far does to the loss, to first order; 0 until it has moved.
        step: nats: what the optimizer's next step would do to the loss, to first order (rate x sum |g|).
        norm: the gradient's norm.
    """

    change: float
    step: float
    norm: float


@dataclass(frozen=True)
class Plan:
    """How many ports stay alive, and by what they are picked.

    Attributes:
        share: of the ports, in (0, 1]: so many stay at most, and at least one.
        period: steps between decisions.
        warmup: first steps, in which all ports are alive; `random`, `top` and given scores need none and ignore it.
        criterion: `importance` divides what a port does for the loss by its traffic; `gradient` takes the greatest
            norms; `random` draws once, because drawing again would throw away what was learned; `top` takes the
            highest blocks.
        seed: of what is drawn, not negative.
        scores: of `importance` alone: importances found elsewhere. The first decision goes by them, without a warm-up,
            and what is measured from then on adds to them as to scores of its own.

    Raises:
        UsageError: a number is out of its range.
    """

    share: float
    period: int
    warmup: int
    criterion: Criterion
    seed: int
    scores: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"--kr-active must be above 0 and at most 1, not {self.share}")
        if self.period < 1:
            raise UsageError(f"--kr-period must be at least 1 step, not {self.period}")
        least = int(self.measures and self.scores is None)
        if self.warmup < least:
            raise UsageError(f"the warm-up must have at least {least} steps, not {self.warmup}")

    @property
    def measures(self) -> bool:
        """Whether decisions depend on what steps measure."""
        return self.share < 1 and self.criterion in ("importance", "gradient")

    @property
    def first(self) -> int:
        """The step of the first decision."""
        return self.warmup if self.measures and self.scores is None else 0


@dataclass(frozen=True)
class Change:
    """What a decision changed; both may be empty."""

    killed: frozenset[str]
    revived: frozenset[str]


@dataclass(frozen=True)
class _Score:
    change: float
    step: float
    measured: int  # the step of the latest measurement

    @property
    def total(self) -> float:
        return self.change + self.step

    def times(self, factor: float) -> "_Score":
        return replace(self, change=factor * self.change, step=factor * self.step)

    def then(self, later: "_Score") -> "_Score":
        old, new = self.times(DECAY), later.times(1 - DECAY)
        return replace(new, change=old.change + new.change, step=old.step + new.step)


class KillRevive:
    """Which ports are alive, and which dead ones a step probes.

    A score is `Signal.change + Signal.step`: what a module does now, and what it could do with its next step. A dropped
    module begins anew, so a killed one forgets the first term. Gradients of all ports shrink as training goes, and a
    dead port is measured only now and then; so scores are relative, in units that keep the alive ports' total.

    Attributes:
        plan: by which they are picked.
        decisions: the step of each decision and the names that it left alive, sorted.
    """

    def __init__(self, ports: Mapping[str, PortShape], plan: Plan) -> None:
        """All of `ports` are alive until the first decision.

        Raises:
            UsageError: there are no ports, or the plan's scores lack one or are not finite.
        """
        if not ports:
            raise UsageError("there are no ports to keep alive; choose --targets that the span has")
        given = ports.keys() if plan.scores is None else {name for name, x in plan.scores.items() if math.isfinite(x)}
        if not ports.keys() <= given:
            raise UsageError(
                f"--kr-scores has a finite number for {len(ports.keys() & given)} of this run's {len(ports)} modules, "
                f"and none for {min(ports.keys() - given)}: make it with `edge_client importances`, of this model, "
                "--cut and --targets"
            )
        self._ports = {name: ports[name] for name in sorted(ports)}
        self.plan = plan
        self._count = max(1, math.floor(plan.share * len(ports) + ROUNDING))
        self._alive = frozenset(ports)
        self._scores = {name: _Score(0.0, max(0.0, score), -1) for name, score in (plan.scores or {}).items()}
        drawn = np.random.default_rng(plan.seed).permutation(len(ports))
        self._order = [list(self._ports)[index] for index in drawn]
        self.decisions: list[tuple[int, tuple[str, ...]]] = []

    @property
    def count(self) -> int:
        """How many ports a decision leaves alive."""
        return self._count

    @property
    def alive(self) -> frozenset[str]:
        """The ports that train."""
        return self._alive

    def decide(self, step: int) -> Change | None:
        """Pick the alive ports anew if a decision is due; call it once before each step (0-based), in order.

        Due at the end of the warm-up, or at step 0 where scores were given, and every period after it; at step 0 alone
        where nothing is measured.
        """
        if not self._due(step):
            return None
        if self.decisions:
            self._fade(since=self.decisions[-1][0])
        before, self._alive = self._alive, self._pick()
        change = Change(killed=before - self._alive, revived=self._alive - before)
        for name in change.killed & self._scores.keys():
            self._scores[name] = replace(self._scores[name], change=0.0)
        self.decisions.append((step, tuple(sorted(self._alive))))
        return change

    def active(self, step: int) -> frozenset[str]:
        """The ports that take part in `step`: the alive, and before a decision as many dead ones, to be measured.

        Those whose measurement is oldest come first, then a seeded order, so all have their turn.
        """
        if not (self.plan.measures and self._due(step + 1)):
            return self._alive
        dead = [name for name in self._order if name not in self._alive]
        dead.sort(key=lambda name: self._scores[name].measured if name in self._scores else -1)
        return self._alive.union(dead[: self._count])

    def observe(self, step: int, signals: Mapping[str, Signal]) -> None:
        """Take in what `step` measured at the ports that were active; what is not finite says nothing."""
        if not self.plan.measures:
            return
        # In the order of names: sums of floats must not depend on the caller's order.
        gradient = self.plan.criterion == "gradient"
        found = {name: signals[name] for name in sorted(signals)}
        fresh = {
            name: _Score(0.0, signal.norm, step) if gradient else _Score(signal.change, signal.step, step)
            for name, signal in found.items()
        }
        fresh = {name: score for name, score in fresh.items() if math.isfinite(score.total)}
        scale = self._scale(fresh)
        for name, score in fresh.items():
            scaled = score.times(scale)
            self._scores[name] = self._scores[name].then(scaled) if name in self._scores else scaled

    def state(self) -> dict[str, Any]:
        """All that later decisions and the report depend on, as JSON."""
        return {
            "ports": list(self._ports),
            "alive": sorted(self._alive),
            "scores": {name: list(astuple(score)) for name, score in self._scores.items()},
            "decisions": [[step, list(names)] for step, names in self.decisions],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken.

        Raises:
            RunError: it is of other ports.
        """
        if state.get("ports") != list(self._ports):
            raise RunError("the checkpoint is of other ports; resume with the model, cut and targets it began with")
        self._alive = frozenset(state["alive"])
        self._scores = {name: _Score(*score) for name, score in state["scores"].items()}
        self.decisions = [(step, tuple(names)) for step, names in state["decisions"]]

    def _due(self, step: int) -> bool:
        if self._count == len(self._ports):
            return False
        first = self.plan.first
        if not self.plan.measures:
            return step == first
        return step >= first and (step - first) % self.plan.period == 0

    def _fade(self, since: int) -> None:
        for name, score in self._scores.items():
            if score.measured < since:
                self._scores[name] = score.times(FADE)

    def _pick(self) -> frozenset[str]:
        worth = {name: self._scores[name].total if name in self._scores else 0.0 for name in self._ports}
        match self.plan.criterion:
            case "importance":
                return select(self._ports, worth, self._count)
            case "gradient":
                ranked = sorted(self._ports, key=lambda name: (-worth[name], name))
            case "random":
                ranked = self._order
            case "top":
                ranked = sorted(self._ports, key=lambda name: (-self._ports[name].block, name))
        return frozenset(ranked[: self._count])

    def _scale(self, fresh: Mapping[str, _Score]) -> float:
        """What brings a step's values into the units of the present scores: the alive ports' total stays."""
        known = [name for name in fresh if name in self._alive and name in self._scores]
        now = sum(fresh[name].total for name in known)
        scale = sum(self._scores[name].total for name in known) / now if now else 1.0
        return scale if 0 < scale < math.inf else 1.0


def traffic(ports: Iterable[PortShape], opened: Collection[tuple[int, str]] = ()) -> int:
    """What `ports` cost together, in values a token, beside groups that are `opened` (block, group) already.

    Its own values for each port; and once for each group that is not opened yet, what its ports share and the price of
    a round trip in either pass.
    """
    shapes = list(ports)
    shared = {(shape.block, shape.group): shape.shared for shape in shapes}
    openings = sum(cost + 2 * ROUND_TRIP_VALUES for group, cost in shared.items() if group not in opened)
    return openings + sum(shape.own for shape in shapes)


def select(ports: Mapping[str, PortShape], scores: Mapping[str, float], count: int) -> frozenset[str]:
    """Pick `count` ports by score for their traffic, greedily.

    Each turn takes the candidate with the greatest score over the traffic that it adds. Candidates are single ports,
    which are cheap where a port of their group was chosen before, and the best few of a group together, which may be
    worth a round trip that none of them is worth alone. A score below 0 counts as 0; ties go by name.
    """
    worth = {name: max(0.0, scores[name]) for name in ports}
    chosen: set[str] = set()
    while len(chosen) < count:
        opened = {(ports[name].block, ports[name].group) for name in chosen}
        turns = (
            (-sum(worth[name] for name in names) / max(1, traffic((ports[name] for name in names), opened)), names)
            for names in _candidates(ports, worth, chosen, count - len(chosen))
        )
        chosen.update(min(turns)[1])
    return frozenset(chosen)


def _candidates(
    ports: Mapping[str, PortShape], worth: Mapping[str, float], chosen: Collection[str], room: int
) -> Iterator[tuple[str, ...]]:
    """Every port that is left, and for each group its 2, 3, ... densest, as many as there is room for.

    At a fixed price of opening a group its best set is always so many of its densest, where room is not short.
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for name in sorted(ports.keys() - chosen):
        yield (name,)
        groups.setdefault((ports[name].block, ports[name].group), []).append(name)
    for names in groups.values():
        names.sort(key=lambda name: -worth[name] / max(1, ports[name].own))
        yield from (tuple(names[:size]) for size in range(2, min(len(names), room) + 1))
