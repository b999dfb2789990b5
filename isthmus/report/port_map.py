"""Kill-and-Revive's map: which ports were alive, and which were only measured, at every step of a run.

Knows what the report says of decisions and what the ledger says of places; draws nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from isthmus.report.fields.ports import KillRevive, Ports
from isthmus.report.history import History
from isthmus.report.schema import RunReport

IDLE: Final = 0
ALIVE: Final = 1
PROBED: Final = 2
"""It was dead, and took part in a step to be measured."""


@dataclass(frozen=True)
class PortMap:
    """Ports over steps.

    Attributes:
        names: the ports', the lowest block's first.
        ends: the last step of each column, ascending: steps with equal columns stand together.
        states: of each port in each column `IDLE`, `ALIVE` or `PROBED`.
    """

    names: tuple[str, ...]
    ends: tuple[int, ...]
    states: tuple[tuple[int, ...], ...]


def port_map(report: RunReport, history: History) -> PortMap | None:
    """The map of a run with Kill-and-Revive that did a step; None of any other."""
    ports = report.ports
    if ports is None or ports.kill_revive is None or not report.steps:
        return None
    order = sorted(range(len(ports.ports)), key=lambda index: (ports.ports[index].block, index))
    ends: list[int] = []
    columns: list[tuple[int, ...]] = []
    for column, steps in groupby(_columns(ports, ports.kill_revive, report.steps, history), key=lambda each: each[1]):
        ends.append(list(steps)[-1][0])
        columns.append(column)
    states = tuple(tuple(column[index] for column in columns) for index in order)
    return PortMap(tuple(ports.ports[index].name for index in order), tuple(ends), states)


def _columns(ports: Ports, policy: KillRevive, steps: int, history: History) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Each step and the states of all ports in it."""
    names = [port.name for port in ports.ports]
    decisions = {decision.step: frozenset(decision.alive) for decision in policy.decisions}
    alive = frozenset(range(len(names)))
    for step in range(1, steps + 1):
        alive = decisions.get(step - 1, alive)
        yield step, _states(names, alive, history, step)


def _states(names: Sequence[str], alive: frozenset[int], history: History, step: int) -> tuple[int, ...]:
    spent = history.steps.get(step)
    seen = {at for at, figures in spent.places.items() if figures.get("edge_forward_flops")} if spent else set()
    return tuple(ALIVE if index in alive else PROBED if name in seen else IDLE for index, name in enumerate(names))
