"""Plots of several runs' fronts: how good each became for its bytes, its round trips and its edge's FLOPs.

Knows fronts, and greys who is dominated; computes none and knows no page.
"""

from collections.abc import Sequence
from typing import Final

from isthmus.report.fronts import Cost, Front, Group, Point
from isthmus.report.plot import Plot, Trace, axis, plain, series_colour, short
from isthmus.report.units import scaled

WIDE_RANGE: Final = 20
"""From which ratio of the greatest to the least cost on the axis is logarithmic."""

NAMED: Final = 8
"""With more runs than these only those on the front have their names beside them; the table names all."""

_UNITS: Final[dict[Cost, str]] = {"bytes": "B", "round trips": "", "edge FLOPs": "FLOP"}
_TITLES: Final[dict[Cost, str]] = {
    "bytes": "bytes of training, or of an emulator",
    "round trips": "round trips of training",
    "edge FLOPs": "FLOPs of the edge in training",
}


def front_plots(key: str, group: Group, runs: Sequence[str]) -> list[Plot]:
    """A plot for each cost.

    Args:
        key: begins the plots' keys.
        group: of which the fronts are.
        runs: names of all runs of the page, in the order that gives them their colours.
    """
    return [_plot(f"{key}-{number}", front, runs) for number, front in enumerate(group.fronts)]


def told(cost: Cost, value: float) -> str:
    """A cost in words, such as "1.20 MB"."""
    return f"{value:,.0f}" if cost == "round trips" else scaled(value, _UNITS[cost])


def _plot(key: str, front: Front, runs: Sequence[str]) -> Plot:
    best = [point for point in front.points if point.on_front]
    beaten = [point for point in front.points if point.beaten_by]
    data = [_stairs(best, front), *(_reference(point, front) for point in front.points if point.reference)]
    if beaten:
        data.append(_dots(beaten, front, "dominated", "--greyed", "circle"))
    data += [_dots([point], front, point.run, series_colour(runs.index(point.run)), "circle") for point in best]
    scale = _logarithmic(front) if _is_wide(front) else {"rangemode": "tozero"}
    layout = {
        "xaxis": axis(_TITLES[front.cost], tickformat="~s", **scale),
        "yaxis": axis(_measured(front), ticksuffix=" %" if front.measure == "accuracy" else ""),
    }
    title = f"{front.measure.capitalize()} against {front.cost}"
    caption = "Grey: dominated. " + ("Bars: 95 % intervals." if front.measure == "accuracy" else "")
    return Plot(key, title, data, layout, (), caption.strip(), 340)


def _measured(front: Front) -> str:
    return "accuracy" if front.measure == "accuracy" else "loss, nats per token"


def _stairs(best: Sequence[Point], front: Front) -> Trace:
    """What can be had at a cost: the best of what costs no more."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [point.cost for point in best],
        "y": [_height(point, front) for point in best],
        "line": {"color": "--quiet", "width": 1, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


def _reference(point: Point, front: Front) -> Trace:
    """The whole model on the edge: a mark, or the height alone where it cost nothing and others did."""
    costs = _positive(front)
    if point.cost or not costs:
        return _dots([point], front, point.run, "--ink", "star")
    return {
        "type": "scatter",
        "mode": "lines+text",
        "name": short(point.run),
        "x": [min(costs), max(costs)],
        "y": [_height(point, front)] * 2,
        "text": [short(point.run), ""],
        "textposition": "top right",
        "textfont": {"color": "--ink", "size": 11},
        "line": {"color": "--ink", "width": 1},
        "hovertext": [_in_words(point, front)] * 2,
        "hoverinfo": "text",
    }


def _dots(points: Sequence[Point], front: Front, name: str, colour: str, symbol: str) -> Trace:
    middle = _middle(front)
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": short(name),
        "x": [point.cost for point in points],
        "y": [_height(point, front) for point in points],
        "text": [short(point.run) if point.on_front or len(front.points) <= NAMED else "" for point in points],
        "textposition": ["middle left" if point.cost > middle else "middle right" for point in points],
        "textfont": {"color": colour if colour == "--greyed" else "--ink", "size": 11},
        "hovertext": [_in_words(point, front) for point in points],
        "hoverinfo": "text",
        "marker": {"color": colour, "size": 11, "symbol": symbol},
        "error_y": _error(points, front, colour),
        "cliponaxis": False,
    }


def _error(points: Sequence[Point], front: Front, colour: str) -> dict[str, object]:
    """95 % intervals, where all of these points have one."""
    limits = [point.interval for point in points if point.interval is not None]
    if len(limits) < len(points):
        return {"visible": False}
    heights = [_height(point, front) for point in points]
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * high - height for (_, high), height in zip(limits, heights, strict=True)],
        "arrayminus": [height - 100 * low for (low, _), height in zip(limits, heights, strict=True)],
        "color": colour,
        "thickness": 1,
        "width": 0,
    }


def _height(point: Point, front: Front) -> float:
    return 100 * point.quality if front.measure == "accuracy" else point.quality


def _positive(front: Front) -> list[float]:
    return [point.cost for point in front.points if point.cost > 0]


def _is_wide(front: Front) -> bool:
    """Whether the axis is logarithmic, on which nothing but a reference may have cost nothing."""
    costs = _positive(front)
    free = any(not (point.cost or point.reference) for point in front.points)
    return bool(costs) and not free and max(costs) / min(costs) >= WIDE_RANGE


def _logarithmic(front: Front) -> dict[str, object]:
    """Of more than two decades only the powers of ten are named: there is no room for more."""
    costs = _positive(front)
    return {"type": "log", "dtick": 1} if max(costs) / min(costs) >= 100 else {"type": "log"}


def _middle(front: Front) -> float:
    """Of the axis: names to the right of it stand left of their marks."""
    costs = _positive(front) or [0.0]
    return float((min(costs) * max(costs)) ** 0.5) if _is_wide(front) else max(costs) / 2


def _in_words(point: Point, front: Front) -> str:
    quality = f"{100 * point.quality:.1f} %" if front.measure == "accuracy" else f"{point.quality:.4f}"
    by = f"<br>dominated by {plain(', '.join(point.beaten_by))}" if point.beaten_by else ""
    return f"{plain(point.run)}<br>{front.measure} {quality}, {told(front.cost, point.cost)}{by}"
