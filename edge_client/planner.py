"""Plans of runs: each one's costs, over the batches that it would see, and its seconds in a place.

Knows what is asked for what; computes no cost by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

from edge_client.config import TrainConfig
from edge_client.plan_devices import Place
from edge_client.plan_rows import PlannedRows
from edge_client.plan_ways import command_of, name_of
from isthmus.planning.figures import Costs, Crossing, Step
from isthmus.planning.plan import Plan, mean_costs
from isthmus.planning.seconds import StepSeconds, step_seconds
from isthmus.planning.workload import Workload

CostsOf = Callable[[TrainConfig, list[Workload]], list[Costs]]
"""The costs of a run with these settings, a batch each."""


@dataclass(frozen=True)
class Planner:
    """Plans runs over the same rows in the same place.

    Attributes:
        rows: that are trained on.
        place: the line and the devices.
        costs_of: asked for every run's costs.
    """

    rows: PlannedRows
    place: Place
    costs_of: CostsOf

    def plan(self, config: TrainConfig) -> Plan:
        """The plan of a run with these settings.

        Raises:
            IsthmusError: it cannot be run so with this model.
        """
        costs = mean_costs(self.costs_of(config, self.rows.workloads(config)))
        return Plan(
            name_of(config),
            command_of(config),
            costs,
            self.rows.steps(config),
            self.rows.steps_per_epoch(config),
            self._seconds(costs.first, config),
            self._seconds(costs.later, config),
            self._fetching(costs.fetch),
        )

    def _seconds(self, step: Step, config: TrainConfig) -> StepSeconds:
        place = self.place
        return step_seconds(step, place.link, place.edge, place.cloud, config.microbatches, handling=place.handling)

    def _fetching(self, fetch: Crossing) -> float:
        link = self.place.link
        return fetch.up_bytes / link.up + fetch.down_bytes / link.down + fetch.round_trips * link.round_trip_s
