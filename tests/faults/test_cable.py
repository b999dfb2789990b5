"""Two network namespaces joined by a cable that is slow, and is pulled: the run goes on where it stood."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from isthmus.report.schema import RunReport
from isthmus.trust import certificates
from tests.faults.training import adapter, as_flags, same_bits, settings, steps_done, wait_until
from tests.harness import ENVIRONMENT, Server, write_rows
from tests.truth.namespaces import CLOUD_ADDRESS, Namespace, joined, missing
from tests.truth.runs import serving_in

STEPS = 30
PULLED_S = 60.0
WITHIN_S = 240.0
SLOW = ("root", "tbf", "rate", "1mbit", "burst", "4kb", "latency", "400ms")
"""1 Mbit/s, and a queue of 400 ms as a mobile network's; `netem` is not in every kernel."""


@dataclass
class Desk:
    """An edge's command line in one namespace, a node in another."""

    place: Path
    edge: Namespace
    cloud: Namespace
    server: Server

    def begin(self, out: str) -> "subprocess.Popen[str]":
        """Begin a run with mutual TLS."""
        config = settings(self.server, self.place / "rows.jsonl", steps=STEPS, microbatches=2, checkpoint_every=5)
        line = ("--certs", "certs/alice", "--out", out)
        return subprocess.Popen(
            [*self.edge.enter, sys.executable, "-m", "edge_client", "train", *as_flags(config), *line],
            env={**ENVIRONMENT, "ISTHMUS_CACHE": str(self.place / "edge-cache")},
            cwd=self.place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def reached(self, client: "subprocess.Popen[str]", out: str, step: int) -> None:
        """Wait until so many steps are done, by a run that is not over."""
        wait_until(lambda: client.poll() is not None or steps_done(self.place / out) >= step, f"step {step}")
        assert client.poll() is None, client.communicate()[1]

    def complete(self, client: "subprocess.Popen[str]", out: str) -> None:
        """Wait for a run's end: complete, and each step once."""
        _, said = client.communicate(timeout=WITHIN_S)
        assert client.returncode == 0, said
        lines = map(json.loads, (self.place / out / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
        assert RunReport.load(self.place / out).status == "complete"


@contextmanager
def _link(end: Namespace, state: str) -> Iterator[None]:
    end.do("ip", "link", "set", end.interface, state)
    try:
        yield
    finally:
        end.do("ip", "link", "set", end.interface, "up")


@pytest.fixture(scope="module")
def desk(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    place = tmp_path_factory.mktemp("cable")
    certificates.init_authority(place / "certs", hosts=(CLOUD_ADDRESS,))
    certificates.issue(place / "certs", "alice")
    write_rows(place / "rows.jsonl")
    flags = ("--model", str(tiny_models["llama"]), "--cut", "1:1", "--certs", "certs/server")
    with joined() as (edge, cloud), serving_in(place, cloud, *flags) as server:
        desk = Desk(place, edge, cloud, server)
        desk.complete(desk.begin("undisturbed"), "undisturbed")
        yield desk


def test_the_cable_may_be_pulled_for_a_minute_on_a_slow_line(desk: Desk) -> None:
    for end in (desk.edge, desk.cloud):
        end.do("tc", "qdisc", "add", "dev", end.interface, *SLOW)
    client = desk.begin("pulled")
    desk.reached(client, "pulled", 4)
    with _link(desk.cloud, "down"):
        before = steps_done(desk.place / "pulled")
        time.sleep(PULLED_S)
        assert steps_done(desk.place / "pulled") <= before + 1, "one step's answers may have been there"
        assert client.poll() is None, "a minute is within its patience"
    desk.complete(client, "pulled")
    assert same_bits(adapter(desk.place / "pulled"), adapter(desk.place / "undisturbed"))
    for end in (desk.edge, desk.cloud):
        end.do("tc", "qdisc", "del", "dev", end.interface, "root")


def test_the_edges_own_link_may_flap(desk: Desk) -> None:
    client = desk.begin("flapping")
    for step in (2, 6, 10):
        desk.reached(client, "flapping", step)
        with _link(desk.edge, "down"):
            time.sleep(1.5)
    desk.complete(client, "flapping")
    assert same_bits(adapter(desk.place / "flapping"), adapter(desk.place / "undisturbed"))
