"""Plots of one run: bytes, compute, seconds, memory, and which ports were alive.

Knows the report's fields and what was found in the run's history; computes nothing and knows no page.
"""

from collections.abc import Mapping
from typing import Final

from isthmus.ledger.record import PHASES
from isthmus.report.history import History
from isthmus.report.median_step import LABELS, Kind, MedianStep, Part, median_step
from isthmus.report.plot import Plot, Trace, axis, bars, plain
from isthmus.report.port_map import port_map
from isthmus.report.schema import RunReport
from isthmus.report.sections import PHASE_LABELS
from isthmus.report.units import scaled, size

_PART_COLOURS: Final[dict[Kind, str]] = {
    "forward": "--forward",
    "backward": "--backward",
    "update": "--update",
    "cloud": "--cloud",
    "queue": "--queue",
    "ports": "--ports",
    "link": "--link",
    "rest": "--rest",
}
_ROW_PIXELS: Final = 14
_MOST_PIXELS: Final = 850
"""Of all rows of a map together; with more ports the rows are lower, and not each has its name beside it."""

_WAYS: Final = (("down", "cloud to edge", "--cloud"), ("up", "edge to cloud", "--edge"))
_BYTES: Final = {"tickformat": "~s", "ticksuffix": "B"}
_NAMES: Final = {"showgrid": False}
_NO_TICKS: Final = {"showgrid": False, "zeroline": False}


def run_plots(key: str, report: RunReport, history: History) -> list[Plot]:
    """Every plot that there are figures for; `key` begins their keys."""
    made = (
        _bytes(key, report),
        _memory(key, report),
        _flops(key, report),
        _seconds(key, report),
        _median_step(key, history),
        _port_map(key, report, history),
    )
    return [plot for plot in made if plot is not None]


def _bytes(key: str, report: RunReport) -> Plot | None:
    traffic = {phase: getattr(report.cost.wire.by_phase, phase) for phase in PHASES}
    used = [phase for phase in reversed(PHASES) if traffic[phase].up_bytes or traffic[phase].down_bytes]
    if not used:
        return None
    labels = [PHASE_LABELS[phase] for phase in used]
    data = []
    for way, name, colour in _WAYS:
        values = [getattr(traffic[phase], f"{way}_bytes") for phase in used]
        told = [f"{label}, {name}: {size(value)}" for label, value in zip(labels, values, strict=True)]
        data.append(bars(name, labels, values, told, colour))
    layout = {"barmode": "group", "xaxis": _BYTES, "yaxis": _NAMES}
    keys = [(name, colour) for _, name, colour in reversed(_WAYS)]
    return Plot(f"{key}-bytes", "Bytes by phase and direction", data, layout, keys, height=50 + 56 * len(used))


def _flops(key: str, report: RunReport) -> Plot | None:
    edge, cloud = report.cost.edge, report.cost.cloud
    again = cloud.recompute_flops or 0
    figures = {
        "Cloud backward": (cloud.backward_flops, "--cloud"),
        "Cloud forward": (cloud.forward_flops and cloud.forward_flops - again, "--cloud"),
        "Edge backward": (edge.backward_flops, "--edge"),
        "Edge forward": (edge.forward_flops, "--edge"),
    }
    data = _sides(figures, "FLOP")
    if again:
        told = [f"Cloud forward, run again for a backward: {scaled(again, 'FLOP')}"]
        data.append(bars("run again", ["Cloud forward"], [again], told, "--queue"))
    layout = {"barmode": "stack", "xaxis": axis("FLOPs", tickformat="~s"), "yaxis": _NAMES}
    keys = [("run again for a backward", "--queue")] if again else []
    title = "Compute of training, by side and pass"
    return Plot(f"{key}-flops", title, data, layout, keys, height=230) if data else None


def _seconds(key: str, report: RunReport) -> Plot | None:
    edge, cloud = report.cost.edge, report.cost.cloud
    figures = {
        "Cloud queue": (cloud.queue_s, "--queue"),
        "Cloud backward": (cloud.backward_s, "--cloud"),
        "Cloud forward": (cloud.forward_s, "--cloud"),
        "Edge waiting": (edge.wait_s, "--link"),
        "Edge backward": (edge.backward_s, "--edge"),
        "Edge forward": (edge.forward_s, "--edge"),
    }
    data = _sides(figures, "s")
    layout = {"barmode": "stack", "xaxis": axis("seconds"), "yaxis": _NAMES}
    return Plot(f"{key}-seconds", "Seconds of training, in all", data, layout, height=260) if data else None


def _memory(key: str, report: RunReport) -> Plot | None:
    edge, cloud = report.cost.edge, report.cost.cloud
    figures = {
        "Cloud process*": (cloud.peak_memory_bytes, "--cloud"),
        "Cloud tensors*": (cloud.peak_tensor_bytes, "--cloud"),
        "Edge process": (edge.peak_memory_bytes, "--edge"),
        "Edge tensors": (edge.peak_tensor_bytes, "--edge"),
    }
    data = _sides(figures, "B")
    of_the_node = cloud.peak_memory_bytes or cloud.peak_tensor_bytes
    caption = "* since the node started, whoever its tenants were" if of_the_node else ""
    layout = {"barmode": "stack", "xaxis": _BYTES, "yaxis": _NAMES}
    return Plot(f"{key}-memory", "Memory, at its peak", data, layout, (), caption, 210) if data else None


def _sides(figures: Mapping[str, tuple[float | None, str]], unit: str) -> list[Trace]:
    """A bar for each figure that exists, in the colour of its side."""
    data: list[Trace] = []
    for label, (value, colour) in figures.items():
        if value is not None:
            told = f"{value:,.2f} s" if unit == "s" else scaled(value, unit)
            data.append(bars(label, [label], [value], [f"{label}: {told}"], colour))
    return data


def _median_step(key: str, history: History) -> Plot | None:
    found = median_step(history)
    if found is None:
        return None
    sides = {"Edge": found.edge, "Cloud": found.cloud}
    lanes = {side: parts for side, parts in sides.items() if parts}
    kinds = [kind for kind in LABELS if any(part.kind == kind for parts in lanes.values() for part in parts)]
    data = [_lane_part(kind, lanes) for kind in kinds]
    clock = f"It took {found.seconds:.2f} s. " if found.seconds is not None else ""
    several = "Of passes in flight at once the seconds are added up. " if _overlap(found) else ""
    caption = (
        f"Step {found.step:,}, the median of {len(history.steps):,}. {clock}{several}"
        "What a side did stands in one piece, whenever it did it within the step."
    )
    layout: dict[str, object] = {
        "barmode": "stack",
        "xaxis": axis("seconds"),
        "yaxis": {**_NAMES, "categoryorder": "array", "categoryarray": list(reversed(lanes))},
    }
    if found.seconds is not None:
        layout["shapes"] = [_line_at(found.seconds)]
    keys = [(LABELS[kind], _PART_COLOURS[kind]) for kind in kinds]
    return Plot(f"{key}-step", "Where each second of a step went", data, layout, keys, caption, 170, wide=True)


def _lane_part(kind: Kind, lanes: dict[str, tuple[Part, ...]]) -> Trace:
    seconds = {side: part.seconds for side, parts in lanes.items() for part in parts if part.kind == kind}
    told = [f"{side}: {LABELS[kind]}, {value:.3f} s" for side, value in seconds.items()]
    return bars(LABELS[kind], list(seconds), list(seconds.values()), told, _PART_COLOURS[kind])


def _overlap(found: MedianStep) -> bool:
    """Whether a side's seconds are clearly more than the clock's."""
    spent = (sum(part.seconds for part in side) for side in (found.edge, found.cloud))
    return found.seconds is not None and any(seconds > 1.05 * found.seconds for seconds in spent)


def _line_at(seconds: float) -> dict[str, object]:
    line = {"color": "--ink", "width": 1, "dash": "dot"}
    return {"type": "line", "x0": seconds, "x1": seconds, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _port_map(key: str, report: RunReport, history: History) -> Plot | None:
    found = port_map(report, history)
    if found is None:
        return None
    heat: Trace = {
        "type": "heatmap",
        "x": [0.5, *(end + 0.5 for end in found.ends)],
        "y": [plain(name) for name in found.names],
        "z": [list(states) for states in found.states],
        "zmin": 0,
        "zmax": 2,
        "colorscale": _steps_of_colour("--track", "--edge", "--queue"),
        "showscale": False,
        "hovertemplate": "%{y}<br>about step %{x:,.0f}<extra></extra>",
        "ygap": 1,
    }
    rows = len(found.names)
    keys = [("alive", "--edge"), ("idle, and measured for one step", "--queue"), ("idle", "--track")]
    layout = {
        "xaxis": axis("step", **_NO_TICKS),
        "yaxis": {**_NO_TICKS, "dtick": -(-rows * _ROW_PIXELS // _MOST_PIXELS), "tickfont": {"size": 10}},
    }
    height = 50 + min(_MOST_PIXELS, _ROW_PIXELS * rows)
    return Plot(f"{key}-ports", "Which ports were alive", [heat], layout, keys, height=height, wide=True)


def _steps_of_colour(*colours: str) -> list[list[object]]:
    """A scale of as many flat colours."""
    count = len(colours)
    ends = [(index / count, (index + 1) / count) for index in range(count)]
    return [[at, colour] for colour, both in zip(colours, ends, strict=True) for at in both]
