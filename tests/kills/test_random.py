"""Twenty kills in one run, of server and edge, at points drawn by chance: it learns what an undisturbed run learns."""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus.faults import Fault
from tests.faults.training import wait_until
from tests.kills.cases import EDGE, EVERYTHING, ONCE, SERVER
from tests.kills.disturbed import Place, check_whole
from tests.kills.forked import KILLED, Forked

KILLS, STEPS = 20, 60
SEEDS = range(1, 6) if EVERYTHING else range(1, 2)


def drawn(points: list[Fault], latest: int, chance: random.Random) -> Iterator[str]:
    """Points with counts up to `latest`, without an end."""
    while True:
        yield f"{chance.choice(points)}:{chance.randint(1, latest)}"


def somebody_dies(server: Forked, edge: Forked) -> None:
    """Wait for it, or for the run's end."""
    wait_until(lambda: server.ended.is_set() or edge.ended.is_set(), "somebody to die, or the run to end")


@pytest.mark.parametrize("method", ["split", "dlora"] if EVERYTHING else ["split"])
@pytest.mark.parametrize("seed", SEEDS)
def test_twenty_kills_in_one_run_change_nothing(
    place: Place, undisturbed: Callable[..., Path], tmp_path: Path, seed: int, method: str
) -> None:
    expected, chance, out = undisturbed(method, steps=STEPS), random.Random(seed), tmp_path / "run"
    of_server = drawn(list(SERVER), 12, chance)
    of_edge = drawn([fault for fault in EDGE if fault not in ONCE], 4, chance)
    server = place.serve(fault=next(of_server))
    address, killed = server.address, {"server": 0, "edge": 0}
    edge = place.train(place.settings(method, address, tmp_path, steps=STEPS), out, next(of_edge))

    def point(drawing: Iterator[str]) -> str:
        return next(drawing) if sum(killed.values()) < KILLS else ""

    while edge.code != 0:
        somebody_dies(server, edge)
        if server.ended.is_set():
            killed["server"] += died(server)
            server = place.serve(listen=address, fault=point(of_server))
        if edge.ended.is_set() and edge.code != 0:
            killed["edge"] += died(edge)
            edge = place.resume(out, point(of_edge))
    server.kill()
    sys.stdout.write(f"seed {seed}: killed {killed}\n")
    assert sum(killed.values()) >= KILLS
    assert min(killed.values()) > 3
    check_whole(out, expected, STEPS)


def died(process: Forked) -> int:
    """One, if it died as it was told to."""
    assert process.code == KILLED, process.said
    return 1
