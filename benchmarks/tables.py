"""Markdown tables between marks in a page that is otherwise written by hand.

Knows text; what stands in a table comes from elsewhere. A table stands between `<!-- table NAME -->` and
`<!-- end -->`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def found(page: Path) -> dict[str, str]:
    """The tables of a page by name."""
    return {name: text.strip() for name, text in _MARKED.findall(page.read_text(encoding="utf-8"))}


def put(page: Path, tables: Mapping[str, str]) -> None:
    """Replace the tables of a page.

    Raises:
        ValueError: the page's marks name other tables.
    """
    if set(found(page)) != set(tables):
        raise ValueError(f"{page} has marks for {sorted(found(page))}; the tables are {sorted(tables)}")
    text = page.read_text(encoding="utf-8")
    page.write_text(_MARKED.sub(lambda mark: _marked(mark[1], tables[mark[1]]), text), encoding="utf-8")


_MARKED = re.compile(r"<!-- table (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def _marked(name: str, text: str) -> str:
    return f"<!-- table {name} -->\n\n{text}\n\n<!-- end -->"


def short(value: float) -> str:
    """Three significant digits, thousands set apart, nothing after the point from a hundred on."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def size(number: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{short(number / scale)} {unit}"
    return f"{short(number)} B"
