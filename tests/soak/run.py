"""`make soak`: 64 edges take 200 steps each on one node, at first alike, then beside one that asks for all it can get.

Knows a node's process and links to it; the model is tiny and random, so that what is measured is the node and not
the arithmetic. What must hold is checked at the end: nobody is starved, what was refused came back, nothing is left.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Annotated

import torch
import typer
import yaml

from edge_client.link import Link
from isthmus.ledger.record import Ledger
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack
from tests.bad_input.raw import describe, opening
from tests.faults.training import wait_until
from tests.harness import Server, save_tiny_model, serving

ROWS, GREEDY_ROWS = (16, 16), (128, 128, 128, 128)
HIDDEN = 32
FAIR = 2.0
"""The others' p95 beside the greedy one may be so many times what it is among equals."""
GROWTH_BYTES = 16 << 20
IN_FLIGHT = 2048
"""Tokens that the greedy one may have unanswered; it asks for more at once, and is refused until there is room."""


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    memory: int
    threads: int
    descriptors: int

    @classmethod
    def by(cls, server: Server) -> "Held":
        """What a node's process holds now."""
        home = Path(f"/proc/{server.process.pid}")
        status = dict(line.split(":", 1) for line in (home / "status").read_text().splitlines() if ":" in line)
        resident, threads = int(status["VmRSS"].split()[0]) << 10, int(status["Threads"])
        return cls(resident, threads, len(list((home / "fd").iterdir())))


class Edge:
    """One edge: it sends a forward and its backward, and is as soon back with the next."""

    def __init__(self, server: Server, credentials: Credentials, name: str, rows: tuple[int, ...]) -> None:
        card = describe(server.address, credentials)
        self._link = Link(server.address, credentials, opening(card, name), Ledger(), card.limits)
        self._rows, self._number = rows, 0
        self._hidden, self._gradient = torch.randn(sum(rows), HIDDEN), torch.randn(sum(rows), HIDDEN)

    def step(self) -> float:
        """A forward and a backward; returns how long both took, in seconds."""
        self._number += 1
        began = time.perf_counter()
        for kind, tensors in ((pb.PASS_FORWARD, (self._hidden,)), (pb.PASS_BACKWARD, (self._gradient, self._hidden))):
            packed = [pack(tensor, "none") for tensor in tensors]
            key = pb.Key(microbatch=self._number, pass_kind=kind)
            call = pb.Call(key=key, tensors=[header for header, _ in packed], rows=pb.Rows(row_lengths=self._rows))
            self._link.request(call, [payload for _, payload in packed], "train").result(300)
        return time.perf_counter() - began

    def leave(self) -> None:
        """End the session."""
        self._link.close()


def among_equals(edges: Sequence[Edge], steps: int) -> list[float]:
    """Seconds of every step of every edge, all at once."""
    with ThreadPoolExecutor(len(edges)) as pool:
        each = pool.map(lambda edge: [edge.step() for _ in range(steps)], edges)
        return [seconds for taken in each for seconds in taken]


def beside_greedy(edges: Sequence[Edge], greedy: Sequence[Edge], steps: int) -> tuple[list[float], int]:
    """The same while the greedy one never stops; and how many steps that one got."""
    stop = Event()

    def ask(edge: Edge) -> int:
        done = 0
        while not stop.is_set():
            edge.step()
            done += 1
        return done

    with ThreadPoolExecutor(len(greedy)) as pool:
        asking = [pool.submit(ask, edge) for edge in greedy]
        try:
            taken = among_equals(edges, steps)
        finally:
            stop.set()
        return taken, sum(each.result() for each in asking)


@contextmanager
def node(home: Path, edges: int) -> Iterator[Server]:
    """A node with a policy, and identities for so many edges and the greedy one."""
    save_tiny_model(home / "model", "llama")
    certificates.init_authority(home / "certs")
    for name in ("greedy", *(f"edge-{number}" for number in range(edges))):
        certificates.issue(home / "certs", name)
    rights = {"models": ["*"], "methods": ["split"], "cuts": ["*"]}
    tenants: dict[str, object] = {f"edge-{number}": rights for number in range(edges)}
    tenants["greedy"] = {**rights, "limits": {"tokens_in_flight": IN_FLIGHT}}
    (home / "policy.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    flags = ("--cut", "1:1", "--certs", str(home / "certs" / "server"), "--policy", str(home / "policy.yaml"))
    # With an arena for each thread, glibc keeps what threads have freed, and no leak could be told from that.
    with serving(home / "model", *flags, cache=home / "cache", MALLOC_ARENA_MAX="1") as server:
        yield server


def settled(server: Server) -> Held:
    """What the node holds once every session is gone."""
    opened = lambda: server.log.count(" opened by ") - server.log.count(" closed")  # noqa: E731
    wait_until(lambda: opened() <= 0, "all sessions to be closed")
    time.sleep(2)
    return Held.by(server)


def main(
    edges: Annotated[int, typer.Option(min=2, help="Edges that take turns.")] = 64,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each.")] = 200,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions of the greedy one.")] = 16,
) -> None:
    """Load a node as a crowd does, and check what it must bear."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, node(home := Path(folder), edges) as server:

        def crowd() -> list[Edge]:
            names = [f"edge-{number}" for number in range(edges)]
            return [Edge(server, Credentials.load(home / "certs" / name), name, ROWS) for name in names]

        def measured(greedy: Sequence[Edge]) -> tuple[float, int]:
            there = crowd()
            taken, done = beside_greedy(there, greedy, steps) if greedy else (among_equals(there, steps), 0)
            for edge in (*there, *greedy):
                edge.leave()
            return statistics.quantiles(taken, n=20)[-1], done

        def crowd_and_greedy() -> tuple[float, int]:
            who = Credentials.load(home / "certs" / "greedy")
            return measured([Edge(server, who, f"greedy-{number}", GREEDY_ROWS) for number in range(sessions)])

        equal_s, _ = measured([])
        beside_s, done = crowd_and_greedy()
        before = settled(server)
        crowd_and_greedy()
        after, refused = settled(server), server.log.count("refused (limit)")
        alone, beside = (f"{1000 * seconds:.0f} ms" for seconds in (equal_s, beside_s))
        typer.echo(f"p95 of a step among {edges} equals {alone}, beside the greedy one {beside}")
        typer.echo(f"the greedy one was refused {refused} times and took {done} steps meanwhile")
        typer.echo(f"the node held {before}, and after as much again {after}")
        assert beside_s < FAIR * equal_s, "the others were starved"
        assert refused > 0 < done, "what was refused did not come back, or nothing was refused"
        assert after.memory - before.memory < GROWTH_BYTES, "memory is left behind"
        assert after.threads <= before.threads, "threads are left behind"
        assert after.descriptors <= before.descriptors, "descriptors are left behind"
        assert "Traceback" not in server.log, server.log[-3000:]


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
