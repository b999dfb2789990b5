"""docs/benchmarks.md, written from the results.

Knows rows and Markdown; measures nothing.
"""

from collections.abc import Iterable

from benchmarks.results import PAGE, Row, Target

INTRODUCTION = """# Benchmarks

What it costs to train a model whose middle runs on somebody else's machine. This page is written by `make bench`
from `benchmarks/results.jsonl`; do not edit it. Run `make bench` to measure on a machine of your own (it fetches a
model of 135 million parameters at first). It goes on where it stopped: what has a result for the present commit is
skipped. `python -m benchmarks.run --again` measures it afresh, `--only NAME` measures one row.

Edge and cloud are processes of their own on one machine, with mutual TLS between them over loopback. Times are
compared side by side in one run, taking turns, after a round that is not counted. A figure is the median; the least
and the greatest of its repeats stand in brackets.
"""


def write(rows: Iterable[tuple[str, str, Row]]) -> None:
    """Write the page from (title, method, row) triples, in their order."""
    known = list(rows)
    parts = [INTRODUCTION, _summary(known), *(_section(*each) for each in known)]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def _summary(rows: list[tuple[str, str, Row]]) -> str:
    lines = ["| benchmark | target | reached | met |", "|---|---|---|---|"]
    for title, _, row in rows:
        if not row.outcome.targets:
            lines.append(f"| {title} | none set | see below | |")
        lines += [
            f"| {title} | {target.text} | {target.reached} | {'yes' if target.met else '**no**'} |"
            for target in row.outcome.targets
        ]
    return "\n".join(lines) + "\n"


def _section(title: str, method: str, row: Row) -> str:
    lines = [f"## {title}", "", method, "", "| figure | |", "|---|---|"]
    lines += [f"| {name} | {figure} |" for name, figure in row.outcome.figures.items()]
    lines += ["", *(_verdict(target) for target in row.outcome.targets)]
    where = f"commit {row.commit}, {row.date}, on {row.machine} ({row.machine.versions})"
    return "\n".join([*lines, "", f"`{row.command}`, {where}.", ""])


def _verdict(target: Target) -> str:
    verdict = "met" if target.met else f"missed: {target.reason}"
    return f"- Target: {target.text}. Reached: {target.reached}. {verdict[0].upper()}{verdict[1:]}."
