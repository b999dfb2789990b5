"""Plots of how runs learned: loss and accuracy over steps, and over what had crossed until then.

Knows curves and scores; finds none of them itself and knows no page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from isthmus.report.curves import Curve, Scored
from isthmus.report.plot import Plot, Trace, axis, plain, series_colour, series_line, short
from isthmus.report.units import size

_FEW: Final = 3
"""Runs whose unsmoothed losses are drawn as well."""

_Over = Literal["step", "crossed"]
_AXES: Final[dict[_Over, dict[str, Any]]] = {
    "step": axis("steps", rangemode="tozero"),
    "crossed": axis("bytes of training, both ways", rangemode="tozero", tickformat="~s", ticksuffix="B"),
}


@dataclass(frozen=True)
class Learned:
    """A run's curve, None where it left none; its scores; and whether anything is known to have crossed for it."""

    curve: Curve | None
    scored: Sequence[Scored]
    has_wire: bool


def learning_plots(runs: Mapping[str, Learned]) -> list[Plot]:
    """Loss and accuracy of named runs, each over steps and over bytes; those that there is something to show in."""
    wired = {name: run for name, run in runs.items() if run.has_wire}
    made = (
        _loss("step", runs, runs),
        _loss("crossed", wired, runs),
        _accuracy("step", runs, runs),
        _accuracy("crossed", wired, runs),
    )
    return [plot for plot in made if plot is not None]


def _loss(over: _Over, runs: Mapping[str, Learned], all_: Mapping[str, Learned]) -> Plot | None:
    data: list[Trace] = []
    for index, name in enumerate(all_):
        if name in runs:
            data += _losses(over, name, runs[name], index, len(all_))
    if not data:
        return None
    layout = {"xaxis": _AXES[over], "yaxis": axis("nats per token")}
    caption = _smoothing(runs) + (_what_crossed(runs, all_) if over == "crossed" else "")
    return Plot(f"loss-{over}", f"Loss over {_said(over)}", data, layout, (), caption.strip(), 290)


def _losses(over: _Over, name: str, run: Learned, index: int, runs: int) -> list[Trace]:
    data: list[Trace] = []
    colour, alone = series_colour(index), runs == 1
    if run.curve is not None:
        x = run.curve.steps if over == "step" else run.curve.crossed
        if run.curve.window > 1 and runs <= _FEW:
            faint = _line(name, x, run.curve.loss, colour, "solid") | {"opacity": 0.3}
            data.append(faint | {"hoverinfo": "skip"})
        line = _line("training" if alone else name, x, run.curve.smoothed, colour, series_line(index))
        data.append(line | {"hovertext": _told(name, over, x, run.curve.smoothed, "loss"), "hoverinfo": "text"})
    marks = [each for each in run.scored if each.loss is not None]
    if marks:
        marked = _marks("held-out rows" if alone else name, over, marks, [each.loss for each in marks], index)
        data.append(marked | ({"mode": "markers"} if run.curve is not None else {}))
    return data


def _accuracy(over: _Over, runs: Mapping[str, Learned], all_: Mapping[str, Learned]) -> Plot | None:
    data: list[Trace] = []
    for index, name in enumerate(all_):
        marks = [each for each in runs[name].scored if each.accuracy is not None] if name in runs else []
        if marks:
            percent = [100 * (each.accuracy or 0.0) for each in marks]
            data.append(_marks(name, over, marks, percent, index))
    if not data:
        return None
    layout = {"xaxis": _AXES[over], "yaxis": axis("% of held-out rows", ticksuffix=" %")}
    emulated = any(each.emulated for run in runs.values() for each in run.scored)
    caption = "Open marks: scored on the emulator. " if emulated else ""
    caption += _what_crossed(runs, all_) if over == "crossed" else ""
    return Plot(f"accuracy-{over}", f"Accuracy over {_said(over)}", data, layout, (), caption.strip(), 290)


def _line(name: str, x: Sequence[float], y: Sequence[float], colour: str, dash: str) -> Trace:
    line = {"color": colour, "width": 2, "dash": dash}
    return {"type": "scatter", "mode": "lines", "name": short(name), "x": list(x), "y": list(y), "line": line}


def _marks(name: str, over: _Over, marks: Sequence[Scored], y: Sequence[float | None], index: int) -> Trace:
    x = [each.step if over == "step" else each.crossed for each in marks]
    symbols = ["diamond-open" if each.emulated else "diamond" for each in marks]
    colour = series_colour(index)
    return _line(name, x, [each for each in y if each is not None], colour, "dot") | {
        "mode": "lines+markers",
        "line": {"color": colour, "width": 1, "dash": "dot"},
        "marker": {"color": colour, "size": 9, "symbol": symbols},
        "hovertext": [_of_mark(name, each) for each in marks],
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _of_mark(name: str, mark: Scored) -> str:
    where = " on the emulator" if mark.emulated else ""
    accuracy = f", accuracy {100 * mark.accuracy:.1f} %" if mark.accuracy is not None else ""
    loss = f", loss {mark.loss:.4f}" if mark.loss is not None else ""
    return f"{plain(name)}{where}<br>step {mark.step:,}, {size(mark.crossed)}{accuracy}{loss}"


def _told(name: str, over: _Over, x: Sequence[int], y: Sequence[float], what: str) -> list[str]:
    def at(value: int) -> str:
        return f"step {value:,}" if over == "step" else size(value)

    return [f"{plain(name)}<br>{at(value)}, {what} {figure:.4f}" for value, figure in zip(x, y, strict=True)]


def _smoothing(runs: Mapping[str, Learned]) -> str:
    curves = [run.curve for run in runs.values() if run.curve is not None]
    widest = max((curve.together * curve.window for curve in curves), default=1)
    lines = f"Lines: training, means of up to {widest:,} steps. " if widest > 1 else "Lines: training. "
    return f"{lines if curves else ''}Diamonds: held-out rows. "


def _what_crossed(runs: Mapping[str, Learned], all_: Mapping[str, Learned]) -> str:
    """What the axis of bytes begins with, and which runs have no place on it."""
    missing = [name for name in all_ if name not in runs]
    emulated = any(mark.emulated for run in runs.values() for mark in run.scored)
    first = "An emulator's own bytes come first. " if emulated else ""
    return first + (f"Nothing is known to have crossed for {', '.join(missing)}." if missing else "")


def _said(over: _Over) -> str:
    return "steps" if over == "step" else "bytes"
