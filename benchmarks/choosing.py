"""docs/choosing.md: its tables from the results, and the figures that its sentences quote.

Knows rows, links and a form of quotation; the sentences are written by hand. A quotation is a Markdown link whose title
names a row and a figure: `[88.1 %](benchmarks.md "methods/movies/split/lora/2:2 accuracy")`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks import methods_figures as figures
from benchmarks.methods_data import PREFIX
from benchmarks.methods_rows import BY_CUT, BY_METHOD, BY_PEFT, CROSSED, DOMAINS, VARIANTS, Variant
from benchmarks.results import ROOT, Figure, Row, latest
from benchmarks.scores import ACCURACY
from benchmarks.tables import put, short, table
from isthmus.planning.links import NAMED, Link

PAGE: Final = ROOT / "docs" / "choosing.md"
LINKS: Final = ("fibre", "wifi", "5g", "4g", "satellite")
"""Of those that the planner knows by name."""


@dataclass(frozen=True)
class Quotation:
    """What a page says of a row: the text that is read, the row and the figure that it is of."""

    text: str
    row: str
    figure: str

    def is_of(self, figure: Figure) -> bool:
        """Whether the numbers in the text are the figure's, and its interval's if that is given, as far as they go."""
        said = _NUMBER.findall(self.text)
        known = [figure.value, figure.low, figure.high]
        whole = len(said) in (1, 3) and None not in known[: len(said)]
        pairs = zip(said, known, strict=False)
        return whole and all(_said(number) == f"{value:.{_places(number)}f}" for number, value in pairs)


_QUOTED = re.compile(r'\[([^\]]+)\]\([\w./#-]+ "(\S+) ([^"]+)"\)')
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def quotations(text: str) -> list[Quotation]:
    """Those of a page, in order."""
    return [Quotation(*found) for found in _QUOTED.findall(text)]


def tables() -> dict[str, str]:
    """The page's tables, by name, from the last results."""
    results = latest()
    return {
        "methods": _methods(results),
        "links": _links(results),
        "domains": _domains(results),
        "others": _others(results),
        "open": _open(results),
    }


def write() -> None:
    """Put the tables into the page."""
    put(PAGE, tables())


def _methods(results: Mapping[str, Row]) -> str:
    """What each method came to on movie reviews."""
    shown = {
        "right, %": ACCURACY,
        "change, points": figures.stage_of(figures.CHANGE, ACCURACY),
        figures.UP: figures.UP,
        figures.DOWN: figures.DOWN,
        figures.TRIPS: figures.TRIPS,
        "to fetch, MB": figures.FETCHED,
        "edge, forward and backward, TFLOP": "edge",
        "cloud, the same": "cloud",
        "edge's tensors, MB": figures.MEMORY,
        "trains": figures.TRAINABLE,
    }
    lines = [
        [f"`{PREFIX}{name}`", *(_cell(found, column) for column in shown.values())]
        for name, found in _there(results, BY_METHOD)
    ]
    return table(["row", *shown], lines)


def _cell(found: Mapping[str, Figure], column: str) -> str:
    if column in ("edge", "cloud"):
        return short(sum(found[f"{column}, {side}"].value for side in ("forward", "backward")))
    return found[column].bare if column in found else ""


def _links(results: Mapping[str, Row]) -> str:
    """Seconds that 1,000 tokens spend on named lines: bytes over the rate, and round trips, nothing hidden."""
    heading = [f"{name} ({'/'.join(f'{value:g}' for value in NAMED[name])})" for name in LINKS]
    lines = []
    for name, found in _there(results, BY_METHOD):
        if found[figures.TRIPS].value:
            lines.append([f"`{PREFIX}{name}`", *(short(_seconds(found, Link.parse(link))) for link in LINKS)])
    return table(["row", *heading], lines)


def _seconds(found: Mapping[str, Figure], link: Link) -> float:
    trips = found[figures.TRIPS].value * found[figures.STEPS].value * 1000 / found[figures.TOKENS].value
    transfer = 1e3 * (found[figures.UP].value / link.up + found[figures.DOWN].value / link.down)
    return transfer + trips * link.round_trip_s


def _domains(results: Mapping[str, Row]) -> str:
    """Accuracy by method and domain, where one was measured, with the untouched model's in the first line."""
    domains = [domain for domain in DOMAINS if _untouched(results, domain)]
    lines = [["untouched", *(_untouched(results, domain) for domain in domains)]]
    for method in BY_METHOD:
        rows = [results.get(PREFIX + Variant(method.method, method.peft, domain=domain).name) for domain in domains]
        if any(rows):
            right = ("" if row is None else row.outcome.figures[ACCURACY].bare for row in rows)
            lines.append([f"`{method.method}`", *right])
    return table(["right, %", *domains], lines)


def _others(results: Mapping[str, Row]) -> str:
    """What other choices of what trains, and of the cut, came to on movie reviews."""
    shown = {
        "right, %": ACCURACY,
        "less `split`, points": figures.stage_of(figures.LESS_SPLIT, ACCURACY),
        figures.UP: figures.UP,
        "edge, forward and backward, TFLOP": "edge",
        "edge's tensors, MB": figures.MEMORY,
        "trains": figures.TRAINABLE,
    }
    lines = [
        [f"`{PREFIX}{name}`", *(_cell(found, column) for column in shown.values())]
        for name, found in _there(results, (*BY_PEFT, *BY_CUT, *CROSSED))
    ]
    return table(["row", *shown], lines) if lines else "None is measured yet."


def _untouched(results: Mapping[str, Row], domain: str) -> str:
    there = [found for name, found in _there(results, VARIANTS) if name.startswith(f"{domain}/")]
    return there[0][figures.stage_of(figures.UNTOUCHED, ACCURACY)].bare if there else ""


def _there(results: Mapping[str, Row], variants: tuple[Variant, ...]) -> Iterator[tuple[str, Mapping[str, Figure]]]:
    for variant in variants:
        row = results.get(PREFIX + variant.name)
        if row is not None:
            yield variant.name, row.outcome.figures


def _open(results: Mapping[str, Row]) -> str:
    """Rows that are planned and not measured, in the order in which they would be."""
    return table(["not measured"], [[f"`{PREFIX}{row.name}`"] for row in VARIANTS if PREFIX + row.name not in results])


def _said(number: str) -> str:
    return number.replace(",", "")


def _places(number: str) -> int:
    return len(number.partition(".")[2])
