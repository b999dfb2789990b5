"""Plans of runs: each one's costs, over the batches that it would see, and its seconds in a place.

Knows what is asked for what; computes no cost by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedConfig

from edge_client.config import TrainConfig
from edge_client.plan_devices import Place
from edge_client.plan_emulator import recipe_for
from edge_client.plan_rows import PlannedRows
from edge_client.plan_ways import command_of, name_of
from isthmus.cut import Cut
from isthmus.emulated.recipe import Recipe
from isthmus.planning.figures import Costs, Crossing, Step
from isthmus.planning.passes import passes_of
from isthmus.planning.plan import Plan, mean_costs
from isthmus.planning.seconds import Passes, StepSeconds, step_seconds
from isthmus.planning.workload import Workload
from isthmus.ports import every

CostsOf = Callable[[TrainConfig, list[Workload], Recipe | None], list[Costs]]
"""The costs of a run with these settings, a batch each; the recipe is of the emulator, for `--method offsite`."""


@dataclass(frozen=True)
class Planner:
    """Plans runs over the same rows in the same place.

    Attributes:
        rows: that are trained on.
        place: the line and the devices.
        configuration: of the model.
        costs_of: asked for every run's costs.
        emulator: that `--method offsite` is planned with, as it was told.
    """

    rows: PlannedRows
    place: Place
    configuration: PreTrainedConfig
    costs_of: CostsOf
    emulator: str
    recipes: dict[str, Recipe] = field(default_factory=dict)  # by cut, for making one takes the whole model

    def plan(self, config: TrainConfig) -> Plan:
        """The plan of a run with these settings.

        Raises:
            IsthmusError: it cannot be run so with this model.
        """
        workloads, recipe = self.rows.workloads(config), self._recipe(config)
        costs = mean_costs(self.costs_of(config, list(workloads), recipe), workloads)
        passes = partial(self._passes, config, costs, recipe, _outputs(workloads))
        parts = min(config.microbatches, max(len(workload.lengths) for workload in workloads))
        return Plan(
            name_of(config),
            str(config.cut),
            command_of(config),
            costs,
            self.rows.steps(config),
            self.rows.steps_per_epoch(config),
            self._seconds(costs.first, parts, passes(known=False)),
            self._seconds(costs.later, parts, passes(known=config.forward_only)),
            self._fetching(costs.fetch),
        )

    def _recipe(self, config: TrainConfig) -> Recipe | None:
        if config.method != "offsite":
            return None
        cut = str(config.cut)
        if cut not in self.recipes:
            self.recipes[cut] = recipe_for(self.emulator, self.configuration, Cut.parse(cut))
        return self.recipes[cut]

    def _passes(
        self, config: TrainConfig, costs: Costs, recipe: Recipe | None, outputs: float, *, known: bool
    ) -> Passes:
        cut = Cut.parse(str(config.cut))
        blocks = cut.span(int(self.configuration.get_text_config().num_hidden_layers))
        beside = sum(block is not None for block in recipe.blocks) if recipe is not None else 0
        if config.peft == "side":
            beside = len(every(config.tap_every, cut, blocks.stop + cut.top, config.tap_width))
        return passes_of(
            self.configuration,
            cut,
            round(outputs),
            costs.trained.total,
            costs.tensors,
            forward_only=config.forward_only,
            known=known,
            beside=beside,
            whole=config.method == "local",
            legs=costs.legs,
            calls=2 if config.peft == "side" else 1,
        )

    def _seconds(self, step: Step, microbatches: int, passes: Passes) -> StepSeconds:
        place = self.place
        return step_seconds(step, place.link, place.edge, place.cloud, microbatches, passes, place.handling)

    def _fetching(self, fetch: Crossing) -> float:
        link = self.place.link
        return fetch.up_bytes / link.up + fetch.down_bytes / link.down + fetch.round_trips * link.round_trip_s


def _outputs(workloads: Mapping[Workload, float]) -> float:
    """Positions of a batch that reach the output layer, on average."""
    return sum(sum(one.losses) * times for one, times in workloads.items()) / sum(workloads.values())
