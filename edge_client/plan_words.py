"""What a plan says in sentences: what it was made for, which limit is in the way, and by how much.

Knows plans, limits and flags; computes no figure.
"""

from collections.abc import Iterator

from transformers import PreTrainedConfig

from edge_client.config import TrainConfig
from edge_client.plan_devices import Place
from edge_client.plan_rows import PlannedRows
from edge_client.plan_settings import PlanSettings
from edge_client.plan_tables import duration
from isthmus.planning.calibration import Measured
from isthmus.planning.fit import Fitted, Limits, needs_of
from isthmus.planning.links import MBIT
from isthmus.planning.machines import Machine
from isthmus.planning.plan import HOUR_S, Plan
from isthmus.report.units import rounded


def made_for(settings: PlanSettings, rows: PlannedRows, place: Place) -> list[str]:
    """The assumptions that a reader must know."""
    mean, link = sum(rows.lengths) / len(rows.lengths), place.link
    count = f"{rows.count:,} rows of {mean:.4g} tokens" if rows.known else f"rows of {mean:.4g} tokens"
    speeds = f"{link.up / MBIT:g} Mbit/s up, {link.down / MBIT:g} down"
    return [
        f"{settings.model}: {count}; {place.line}: {1e3 * link.round_trip_s:g} ms a round trip, {speeds}",
        f"edge: {_device(place.edge)}",
        f"cloud: {_device(place.cloud)}",
    ]


def measured_otherwise(settings: PlanSettings, configuration: PreTrainedConfig, place: Place) -> list[str]:
    """What the calibrated device computed that is not what is planned; none where it was alike, a line otherwise."""
    if place.measured is None:
        return []
    planned = Measured(
        model_type=configuration.model_type,
        hidden_size=int(configuration.get_text_config().hidden_size),
        dtype=settings.run.get("dtype", TrainConfig.model_fields["dtype"].default),
    )
    if place.measured == planned:
        return []
    shapes = f"{_shape(place.measured)}, and this is {_shape(planned)}"
    advice = "seconds of the edge may be off; measure anew with `edge_client calibrate`"
    return [f"warning: {settings.calibration} was measured with {shapes}: {advice}"]


def _shape(measured: Measured) -> str:
    return f"{measured.model_type} {measured.hidden_size} wide in {measured.dtype}"


def _device(machine: Machine) -> str:
    return f"{machine.name}, {rounded(machine.flops, 'FLOP/s')} reached"


def over_limits(plans: tuple[Plan, ...], limits: Limits) -> list[str]:
    """Which of several plans break limits, a line each."""
    lines = []
    for name, limit in limits.told().items():
        over = [plan.name for plan in plans if needs_of(plan)[name] > limit]
        if over:
            lines.append(f"over {_limit(name, limit)}: {', '.join(over)}")
    return lines


def why(fitted: Fitted, limits: Limits) -> list[str]:
    """Of a plan that was found: what it takes of each limit, and what each limit keeps from being taken."""
    if fitted.plan is None:
        return []
    lines = [f"best of {fitted.tried:,} plans that were looked at (docs/planning.md says what is better)"]
    shares = limits.shares(fitted.plan)
    for name, limit in limits.told().items():
        lines.append(f"{_limit(name, limit)}: takes {_need(fitted.plan, name)}, {100 * shares[name]:.0f} %")
    for name, better in fitted.binding.items():
        takes = _need(better, name)
        lines.append(f"{_flag(name)} binds: without it {better.name} would be taken, which takes {takes}")
    if fitted.together and not fitted.binding:
        lines.append("the limits bind together: every better plan breaks more than one of them")
    if not fitted.together:
        lines.append("no limit binds: it is the most preferred of all")
    return lines


def impossible(fitted: Fitted, limits: Limits) -> str:
    """Of a search that found none: which limit fails, by how much, and what comes nearest."""
    short = list(_too_small(fitted, limits))
    if short:
        return "; ".join(short)
    nearest = fitted.nearest
    if nearest is None:
        return "there is nothing to choose from: no method allows what was told; tell less"
    shares = limits.shares(nearest)
    over = [
        f"{_times(shares[name])} times {_limit(name, limit)} ({_need(nearest, name)})"
        for name, limit in limits.told().items()
        if shares[name] > 1
    ]
    return (
        f"each limit can be kept by itself, but not all together: what comes nearest, {nearest.name} "
        f"({_where(nearest)}), takes {' and '.join(over)}; raise what it breaks"
    )


def _too_small(fitted: Fitted, limits: Limits) -> Iterator[str]:
    told = limits.told()
    for one in fitted.shortages:
        yield (
            f"{_limit(one.limit, told[one.limit])} is {_times(one.times)} times too small: the least that any of "
            f"{fitted.tried:,} plans takes is {_need(one.least, one.limit)} ({one.least.name}, {_where(one.least)})"
        )


def _where(plan: Plan) -> str:
    return f"cut {plan.cut}"


def _times(share: float) -> str:
    return f"{share:,.0f}" if share >= 100 else f"{share:.3g}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _limit(name: str, limit: float) -> str:
    return (
        f"{_flag(name)} {limit:g}" if name == "max_hours" else f"{_flag(name)} {rounded(limit, 'B').replace(' ', '')}"
    )


def _need(plan: Plan, name: str) -> str:
    need = needs_of(plan)[name]
    return duration(need * HOUR_S) if name == "max_hours" else rounded(need, "B")
