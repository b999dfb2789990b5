"""What plots are made of: figures as plotly.js reads them, in the page's own colours, with names shown as they are.

Knows the form of a figure; knows no report. A colour is the name of one of the page's CSS variables, such as `--edge`,
so that light and dark need no figures of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

SERIES: Final = 7
"""Colours for runs: `--series-0` and so on; a run beyond them has the first again, and a dashed line."""

LONGEST: Final = 22
"""Characters of a name in a plot; the rest is in the text beside it."""

Trace = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """A figure with what is said above and below it.

    Attributes:
        key: short and unique in a page.
        data, layout: as plotly.js takes them, without what is the same in all plots.
        keys: what stands for what, and in which colour; the page says it above the plot.
        height: pixels.
    """

    key: str
    title: str
    data: Sequence[Trace]
    layout: dict[str, Any]
    keys: Sequence[tuple[str, str]] = ()
    caption: str = ""
    height: int = 280
    wide: bool = False

    def figure(self) -> dict[str, Any]:
        """For the page's script."""
        return {"data": list(self.data), "layout": {"height": self.height, **self.layout}}


def plain(text: str) -> str:
    """Text that plotly.js shows as it is: it reads some HTML in texts, and these names are a stranger's."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def short(name: str) -> str:
    """A name for a legend: its end is what tells runs apart as often as its beginning, so the middle goes."""
    if len(name) > LONGEST:
        half = (LONGEST - 1) // 2
        name = f"{name[:half]}…{name[-half:]}"
    return plain(name)


def series_colour(index: int) -> str:
    """The colour of a run, by its place among them."""
    return f"--series-{index % SERIES}"


def series_line(index: int) -> str:
    """The line of a run, by its place among them: "solid", and from where colours come again "dash" and "dot"."""
    return ("solid", "dash", "dot")[index // SERIES % 3]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title."""
    return {"title": {"text": title}, **more}


def bars(name: str, labels: Sequence[str], values: Sequence[float], told: Sequence[str], colour: str) -> Trace:
    """Bars to the right, one for each label, each with a text for whoever points at it."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": list(values),
        "y": list(labels),
        "hovertext": list(told),
        "hoverinfo": "text",
        "marker": {"color": colour},
    }
