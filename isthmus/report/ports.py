"""Ports for people: how many there are, what chose among them, and a chart of which were alive when.

Knows the report's ports and its number of steps; the totals of a run, and all that is not about ports, are the table's.
"""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from rich.text import Text

from isthmus.report.fields.ports import Ports
from isthmus.report.schema import RunReport
from isthmus.report.units import NONE, scale

COLUMNS: Final = 44
"""Of the chart at most: its lines then fit a terminal of 80."""

WIDTH: Final = 80

_SHADES: Final = "░▒▓"
_LEGEND: Final = "Of a block's ports:  · none  ░ under 1/3  ▒ under 2/3  ▓ fewer than all  █ all"


@dataclass(frozen=True)
class _Span:
    """Steps between two decisions, and the ports alive in them."""

    steps: int
    alive: Set[int]


def number(report: RunReport) -> str:
    """Such as "52 in 26 blocks"."""
    ports = report.ports
    return f"{len(ports.ports):,} in {len(ports.blocks):,} blocks" if ports else NONE


def kill_revive(report: RunReport) -> str:
    """Such as "1/8 alive, every 10 steps, drop"."""
    policy = report.ports.kill_revive if report.ports else None
    if policy is None:
        return NONE
    simple = Fraction(policy.share).limit_denominator(64)
    exact = simple.denominator > 1 and abs(simple - policy.share) < 1e-9
    share = str(simple) if exact else f"{100 * policy.share:g} %"
    return f"{share} alive, every {policy.period:,} steps, {policy.idle}"


def chosen_by(report: RunReport) -> str:
    """By what Kill-and-Revive chose."""
    policy = report.ports.kill_revive if report.ports else None
    return policy.criterion if policy else NONE


def values_sent(report: RunReport) -> str:
    """Whether Kill-and-Revive sent adapter values to the cloud."""
    policy = report.ports.kill_revive if report.ports else None
    return ("yes" if policy.left_edge else "no") if policy else NONE


def ports_chart(report: RunReport) -> Text | None:
    """One line for each block, the top one first: how many of its ports were alive when, and what they cost.

    A column is the steps from one decision to the next; where those are over `COLUMNS`, neighbours share one.
    None where the run has no ports or did no step.
    """
    if report.ports is None or not report.steps:
        return None
    spans = _spans(report.ports, report.steps)
    together = -(-len(spans) // COLUMNS)
    columns = [spans[first : first + together] for first in range(0, len(spans), together)]
    heading, rows = _heading(report.ports, report.steps, together), _rows(report.ports, columns)
    lines = [heading, "", *rows, "", _LEGEND, *_at_the_end(report.ports)]
    return Text("\n".join(lines), no_wrap=True, overflow="crop")


def _heading(ports: Ports, steps: int, together: int) -> str:
    when = f"Ports alive in steps 1 to {steps:,}"
    if ports.kill_revive is None:
        return f"{when}: all of them throughout"
    column = "decision" if together == 1 else f"{together} decisions"
    return f"{when}; a new column at every {column}\nBytes and FLOPs include the warm-up and the probes"


def _rows(ports: Ports, columns: Sequence[Sequence[_Span]]) -> Iterator[str]:
    """Two lines of heads, and then the blocks."""
    blocks = ["block", *(str(cost.block) for cost in ports.blocks)]
    strips = ["alive", *(_strip(ports, cost.block, columns) for cost in ports.blocks)]
    units, *costs = zip(blocks, strips, *_costs(ports), strict=True)
    wide = max(map(len, strips))
    for block, strip, up, down, adapters in (("", "", "up", "down", "adapters"), units, *reversed(costs)):
        yield f"{block:>5}  {strip:{wide}}  {up:>6}  {down:>6}  {adapters:>8}".rstrip()


def _at_the_end(ports: Ports) -> list[str]:
    """By name, lowest block first, what the last decision left alive."""
    if ports.kill_revive is None or not ports.kill_revive.decisions:
        return []
    names = [ports.ports[index].name for index in ports.kill_revive.decisions[-1].alive]
    by_block: dict[str, list[str]] = {}
    for name in names:
        block, _, module = name.partition(".")
        by_block.setdefault(block, []).append(module.rpartition(".")[2])
    said = "; ".join(f"{block} {' '.join(modules)}" for block, modules in by_block.items())
    return textwrap.wrap(f"Alive at the end: {said or 'none'}", WIDTH)


def _spans(ports: Ports, steps: int) -> list[_Span]:
    decisions = ports.kill_revive.decisions if ports.kill_revive else ()
    starts = [0, *(decision.step for decision in decisions)]
    alive = [frozenset(range(len(ports.ports))), *(frozenset(decision.alive) for decision in decisions)]
    spans = zip(starts, [*starts[1:], steps], alive, strict=True)
    return [_Span(end - start, those) for start, end, those in spans if end > start]


def _strip(ports: Ports, block: int, columns: Sequence[Sequence[_Span]]) -> str:
    own = {index for index, port in enumerate(ports.ports) if port.block == block}
    return "".join(_shade(own, column) for column in columns)


def _shade(own: Set[int], column: Sequence[_Span]) -> str:
    alive = sum(span.steps * len(own & span.alive) for span in column)
    possible = sum(span.steps * len(own) for span in column)
    if alive in (0, possible):
        return "█" if alive else "·"
    return _SHADES[3 * alive // possible]


def _costs(ports: Ports) -> tuple[list[str], list[str], list[str]]:
    """Bytes up, bytes down, and the adapters' FLOPs: of each its unit, and then a figure in it for every block."""
    flops: Counter[int] = Counter()
    for port in ports.ports:
        flops[port.block] += port.edge_forward_flops + port.edge_backward_flops
    up, down = [cost.up_bytes for cost in ports.blocks], [cost.down_bytes for cost in ports.blocks]
    crossed = _in_one_unit([*up, *down], "B")
    return (
        crossed[: len(up) + 1],
        [crossed[0], *crossed[len(up) + 1 :]],
        _in_one_unit([flops[cost.block] for cost in ports.blocks], "FLOP"),
    )


def _in_one_unit(values: Sequence[int], unit: str) -> list[str]:
    """The unit, and then each figure in it."""
    divisor, prefix = scale(max(values, default=0))
    return [f"{prefix}{unit}", *(f"{value / divisor:,.{2 if prefix else 0}f}" for value in values)]
