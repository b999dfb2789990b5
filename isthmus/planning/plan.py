"""One way to train, planned: its costs, its seconds, and what the whole run comes to.

Knows figures and adds them up; knows no settings, no model and no limit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from isthmus.planning.figures import Costs, Crossing, Step
from isthmus.planning.seconds import StepSeconds
from isthmus.planning.workload import Workload

HOUR_S = 3600.0


@dataclass(frozen=True)
class Plan:
    """A way to train and what it costs.

    Attributes:
        name: what it is called in a table.
        cut: of the model, as text.
        command: the `edge_client train` that trains so, but for files and the server.
        costs: of it.
        steps: of the run.
        steps_per_epoch: of them that one pass over the rows takes.
        first: seconds of a step of the first epoch.
        later: of a step after it.
        fetch_s: seconds of fetching what is fetched once.
    """

    name: str
    cut: str
    command: str
    costs: Costs
    steps: int
    steps_per_epoch: int
    first: StepSeconds
    later: StepSeconds
    fetch_s: float

    @property
    def fresh_steps(self) -> int:
        """Steps of the first epoch that the run takes."""
        return min(self.steps, self.steps_per_epoch)

    @property
    def training(self) -> Step:
        """All steps together."""
        return self.costs.training(self.steps, self.steps_per_epoch)

    @property
    def crossing(self) -> Crossing:
        """All that crosses in the run: what is fetched once, and the steps."""
        return self.costs.fetch + self.training.crossing

    @property
    def total_bytes(self) -> float:
        """Both ways."""
        return self.crossing.up_bytes + self.crossing.down_bytes

    @property
    def epoch_s(self) -> float:
        """Seconds of the first pass over the rows, had it no end before."""
        return self.first.total * self.steps_per_epoch

    @property
    def later_epoch_s(self) -> float:
        """Seconds of each pass after it."""
        return self.later.total * self.steps_per_epoch

    @property
    def total_s(self) -> float:
        """Seconds of the run, fetching included."""
        return self.fetch_s + self.first.total * self.fresh_steps + self.later.total * (self.steps - self.fresh_steps)

    @property
    def hours(self) -> float:
        """The same in hours."""
        return self.total_s / HOUR_S

    @property
    def quiet_later(self) -> bool:
        """Whether less crosses from the second epoch on."""
        return self.costs.later.crossing != self.costs.first.crossing


def mean_costs(costs: Sequence[Costs], batches: Mapping[Workload, float]) -> Costs:
    """The mean over batches of what differs by batch, and over their rows of what is kept of each; the greatest peaks.

    Args:
        costs: of one run, a batch each.
        batches: in the same order, each with how many of the run's it stands for; not all for none.
    """
    steps, rows = sum(batches.values()), sum(times * len(batch.lengths) for batch, times in batches.items())
    first = later = Step()
    cache = 0.0
    for one, (batch, times) in zip(costs, batches.items(), strict=True):
        first += one.first * (times / steps)
        later += one.later * (times / steps)
        cache += one.storage.cache * (times * len(batch.lengths) / rows)
    return replace(
        costs[0],
        first=first,
        later=later,
        edge_peak_tensor_bytes=max(one.edge_peak_tensor_bytes for one in costs),
        cloud_peak_tensor_bytes=max(one.cloud_peak_tensor_bytes for one in costs),
        storage=replace(costs[0].storage, cache=round(cache)),
    )
