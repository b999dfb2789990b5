"""Costs of many runs with one model: what is placed alike is placed once.

Knows which settings leave what was placed as it is; computes no cost by itself.
"""

from collections.abc import Mapping
from typing import Final

from transformers import PreTrainedConfig

from edge_client.config import TrainConfig
from edge_client.plan_settings import OF_PORTS
from edge_client.planned import Planned, Spans
from isthmus.emulated.recipe import Recipe
from isthmus.planning.figures import Costs
from isthmus.planning.workload import Workload

SAME_PLACES: Final = frozenset(
    {"codec", "codec_gradient", "codec_port", "batch_size", "microbatches", "epochs", "max_length", *OF_PORTS}
    - {"exchange"}
)
"""Settings that change neither what stands where nor what trains."""


class CostsOfRuns:
    """Costs of a model's runs; an `edge_client.planner.CostsOf`."""

    def __init__(
        self, configuration: PreTrainedConfig, span_dtype: str, beside: Mapping[str, int] | None = None
    ) -> None:
        """Plan with a model whose span computes in `span_dtype`, and that has files `beside` its weights, by size."""
        self._configuration, self._span_dtype, self._beside = configuration, span_dtype, beside
        self._placed: dict[str, Planned] = {}
        self._spans: Spans = {}

    def __call__(self, config: TrainConfig, workloads: list[Workload], recipe: Recipe | None) -> list[Costs]:
        """The costs of a run, a batch each.

        Raises:
            IsthmusError: this model cannot be trained so.
        """
        key = config.model_dump_json(exclude=set(SAME_PLACES))
        if key not in self._placed:
            self._placed[key] = Planned(
                config, self._configuration, self._span_dtype, recipe, self._beside, self._spans
            )
        planned = self._placed[key].changed(config)
        return [planned.costs(workload) for workload in workloads]
