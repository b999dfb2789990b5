"""A plan made: of one way to train, of all side by side, or of the one that fits best.

Knows the order of things; what each is asked for is done elsewhere.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from transformers import PreTrainedConfig

from edge_client.config import TrainConfig
from edge_client.peft_methods import method_of
from edge_client.plan_candidates import tiers
from edge_client.plan_devices import Place
from edge_client.plan_rows import PlannedRows
from edge_client.plan_settings import PlanSettings
from edge_client.plan_ways import WAYS, name_of
from edge_client.planner import CostsOf, Planner
from isthmus.architectures import check_architecture, reads_both_ways
from isthmus.cut import Cut
from isthmus.errors import IsthmusError, ModelError, UsageError
from isthmus.planning.configurations import find, read
from isthmus.planning.fit import Fitted, fit
from isthmus.planning.plan import Plan
from isthmus.training.progress import Meter, meter


@dataclass(frozen=True)
class Made:
    """What was planned.

    Attributes:
        rows: that it was planned for.
        place: where.
        plans: in the order in which they are shown; with `fitted`, at most its one.
        refused: ways that this model, or what was told, does not allow: the reason by name.
        fitted: how the search for the best ended, if there was one.
    """

    rows: PlannedRows
    place: Place
    plans: tuple[Plan, ...]
    refused: dict[str, str] = field(default_factory=dict)
    fitted: Fitted | None = None


def configuration_of(settings: PlanSettings) -> PreTrainedConfig:
    """The model's configuration, of a model that can be trained across a cut.

    Raises:
        ModelError: there is none, or it predicts no next token.
        CutError: it is an encoder-decoder, or the cut leaves no span.
    """
    configuration = read(find(settings.model))
    check_architecture(configuration)
    if reads_both_ways(configuration):
        raise ModelError(f"{configuration.model_type} predicts no next token, and plans are of language models")
    if "cut" in settings.run or not settings.fit:
        Cut.parse(settings.cut).span(int(configuration.get_text_config().num_hidden_layers))
    return configuration


def make(settings: PlanSettings, configuration: PreTrainedConfig, costs_of: CostsOf, console: Console) -> Made:
    """Plan what the settings ask for.

    Args:
        settings: of the plan.
        configuration: of the model.
        costs_of: asked for every run's costs.
        console: where progress is shown.

    Raises:
        IsthmusError: whatever stands in the way of all that was asked for.
    """
    if "peft" in settings.run:
        method_of(settings.run["peft"])
    rows, place = PlannedRows.of(settings, configuration), Place.of(settings)
    planner = Planner(rows, place, configuration, costs_of, settings.emulator)
    if settings.fit:
        return _fitted(settings, planner, console)
    if "method" in settings.run:
        return Made(rows, place, (planner.plan(settings.configured({})),))
    configs, misfits = _ways(settings)
    with meter(console, "plan", len(configs)) as progress:
        plans, refused = _as_far_as_possible(configs, planner, progress)
    return Made(rows, place, tuple(plans), misfits | refused)


def _ways(settings: PlanSettings) -> tuple[list[TrainConfig], dict[str, str]]:
    """The ways that what was told fits, each once, and why it does not fit others.

    Raises:
        UsageError: it fits none.
    """
    configs: list[TrainConfig] = []
    misfits: dict[str, str] = {}
    for way in WAYS:
        try:
            config = way.configured(settings)
        except UsageError as error:
            misfits[way.name(settings)] = str(error)
            continue
        if config not in configs:
            configs.append(config)
    if not configs:
        raise UsageError(next(iter(misfits.values())))
    return configs, misfits


def _as_far_as_possible(
    configs: Sequence[TrainConfig], planner: Planner, progress: Meter
) -> tuple[list[Plan], dict[str, str]]:
    """The plans, and why some are none.

    Raises:
        IsthmusError: all are none.
    """
    plans: list[Plan] = []
    refused: dict[str, str] = {}
    for number, config in enumerate(configs, start=1):
        try:
            plans.append(planner.plan(config))
        except IsthmusError as error:
            if number == len(configs) and not plans:
                raise
            refused[name_of(config)] = str(error)
        progress.update(number, name_of(config))
    return plans, refused


def _fitted(settings: PlanSettings, planner: Planner, console: Console) -> Made:
    blocks = int(planner.configuration.get_text_config().num_hidden_layers)
    groups = list(tiers(settings, blocks))
    refusals: list[IsthmusError] = []
    with meter(console, "plan", sum(map(len, groups))) as progress:
        fitted = fit(_planned(groups, planner, refusals, progress.update), planner.place.limits(settings))
    if fitted.nearest is None and fitted.plan is None and refusals:
        raise refusals[0]
    found = () if fitted.plan is None else (fitted.plan,)
    return Made(planner.rows, planner.place, found, fitted=fitted)


def _planned(
    groups: Iterable[Sequence[TrainConfig]],
    planner: Planner,
    refusals: list[IsthmusError],
    update: Callable[[int, str], None],
) -> Iterator[list[Plan]]:
    """The plans of each group in turn; settings that the model does not allow are put into `refusals`."""
    done = 0
    for group in groups:
        plans = []
        for config in group:
            try:
                plans.append(planner.plan(config))
            except IsthmusError as error:
                refusals.append(error)
            done += 1
            update(done, name_of(config))
        yield plans
