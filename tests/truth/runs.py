"""A run of each method that crosses the wire, between two namespaces, and what crossed by either count.

Knows commands and files; the kernel's count and the ledger's meet here and nowhere else.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus.report.schema import RunReport
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from tests.harness import ENVIRONMENT, Server, once_ready, save_tiny_model
from tests.offsite.by_hand import make_emulator
from tests.truth.framing import Crossing
from tests.truth.namespaces import CLOUD_ADDRESS, Namespace, joined

SIZES = {"hidden_size": 512, "intermediate_size": 256, "num_key_value_heads": 1, "max_position_embeddings": 512}
ROWS, SHORTEST, LONGEST = 24, 380, 500
EDGE = "alice"


@dataclass(frozen=True)
class Case:
    """A run: what it is called, the flags that make it, and whether its adapter is handed in."""

    name: str
    flags: tuple[str, ...]
    submits: bool = False


def _case(name: str, flags: str, submits: bool = False) -> Case:
    return Case(name, tuple(flags.split()), submits)


CASES = (
    _case("split", "--method split --steps 3 --batch-size 4 --microbatches 2"),
    _case("split --train top", "--method split --train top --steps 8 --batch-size 4"),
    _case("side", "--method side --tap-every 2 --steps 8 --batch-size 4"),
    _case(
        "dlora, Kill-and-Revive",
        "--method dlora --steps 6 --batch-size 1 --kr-active 0.5 --kr-period 2 --kr-warmup 2 --kr-idle park",
    ),
    _case("offsite", "--method offsite --emulator half --peft full --steps 2 --batch-size 4 --watch 2", submits=True),
)


@dataclass(frozen=True)
class Crossed:
    """What a run moved, up and down, and how much of it, both ways, was to fetch the ends or an emulator."""

    up: Crossing
    down: Crossing
    fetched: int

    @property
    def both(self) -> Crossing:
        """The two directions as one."""
        return self.up + self.down


@dataclass(frozen=True)
class Site:
    """A node in one namespace and an edge in the other, with the files of both."""

    place: Path
    edge: Namespace
    cloud: Namespace
    server: Server

    def run(self, case: Case) -> Crossed:
        """Carry a case out as a user would, while the kernel counts."""
        out = self.place / case.name.replace(" ", "-")
        before = self.edge.sent(), self.cloud.sent()
        self._command("train", *case.flags, "--data", "rows.jsonl", "--out", str(out), *self._line, "--threads", "1")
        if case.submits:
            self._command("submit", "--run", str(out))
        up, down = (end.sent() - then for end, then in zip((self.edge, self.cloud), before, strict=True))
        assert "Traceback" not in self.server.log, self.server.log
        spent = ledger_bytes(out)
        return Crossed(
            Crossing(sum(spent["up"].values()), up.bytes, up.packets, up.retransmitted, up.opened),
            Crossing(sum(spent["down"].values()), down.bytes, down.packets, down.retransmitted, up.opened),
            spent["up"]["fetch"] + spent["down"]["fetch"],
        )

    @property
    def _line(self) -> tuple[str, ...]:
        return ("--server", self.server.address, "--certs", str(self.place / "certs" / EDGE))

    def _command(self, *arguments: str) -> None:
        done = subprocess.run(
            [*self.edge.enter, sys.executable, "-m", "edge_client", *arguments],
            env={**ENVIRONMENT, "ISTHMUS_CACHE": str(self.place / "edge-cache")},
            cwd=self.place,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr


def ledger_bytes(run: Path) -> dict[str, Counter[str]]:
    """Bytes up and down by a run's ledger, each by phase; its report must say the same."""
    spent: dict[str, Counter[str]] = {"up": Counter(), "down": Counter()}
    for line in map(json.loads, (run / "ledger.jsonl").read_text().splitlines()):
        for way, phases in spent.items():
            phase = "eval" if line["phase"] == "look" else line["phase"]  # as the report has it
            phases[phase] += line.get(f"{way}_bytes", 0)
    reported = RunReport.load(run).cost.wire.by_phase.model_dump()
    for way, phases in spent.items():
        assert {phase: phases[phase] for phase in reported} == {
            phase: traffic[f"{way}_bytes"] for phase, traffic in reported.items()
        }
    return spent


@contextmanager
def site(place: Path) -> Iterator[Site]:
    """A node that serves a small wide model over mutual TLS, in a namespace of its own, while in here."""
    model, owner = place / "wide", place / "certs"
    save_tiny_model(model, "llama", **SIZES)
    certificates.init_authority(owner, hosts=(CLOUD_ADDRESS,))
    certificates.issue(owner, EDGE)
    (place / "signers").mkdir()
    shutil.copy(owner / "authority" / "issued" / f"{EDGE}.pub", place / "signers")
    make_emulator(place / "emulators" / "half", model, "1:1", Credentials.load(owner / "server").signing_key())
    write_texts(place / "rows.jsonl")
    folders = ("--emulators", "emulators", "--submissions", "submissions", "--signers", "signers")
    flags = ("--model", "wide", "--cut", "1:1", "--certs", "certs/server", *folders)
    with joined() as (edge, cloud), serving_in(place, cloud, *flags) as server:
        yield Site(place, edge, cloud, server)


@contextmanager
def serving_in(place: Path, cloud: Namespace, *flags: str, port: int = 0) -> Iterator[Server]:
    """A node started in a folder and a namespace with these flags, while in here."""
    listen = ("--listen", f"{CLOUD_ADDRESS}:{port}", "--threads", "1")
    process = subprocess.Popen(
        [*cloud.enter, sys.executable, "-m", "cloud_node", "serve", *listen, *flags],
        env={**ENVIRONMENT, "ISTHMUS_CACHE": str(place / "cloud-cache")},
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield once_ready(process)
    finally:
        process.kill()
        process.wait(10)


def write_texts(path: Path) -> None:
    """Rows of letters, of differing lengths; a token is a byte."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST, (ROWS,), generator=generator)
    letters = [torch.randint(97, 123, (int(length),), generator=generator) for length in lengths]
    path.write_text("".join(json.dumps({"text": bytes(row.tolist()).decode()}) + "\n" for row in letters))
