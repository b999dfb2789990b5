"""A node over mutual TLS that is watched while an edge trains on it, fetches an emulator and keeps a session open."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from edge_client.server import describe
from edge_client.stream import open_channel
from isthmus import PROTOCOL
from isthmus.ledger.record import Ledger
from isthmus.report.schema import RunReport
from isthmus.rows import Rows
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from tests.faults.frames import Wire
from tests.faults.training import run_here, settings
from tests.harness import Server, serving
from tests.offsite.by_hand import make_emulator
from tests.watching.reading import Series, StatusPort

CANARY = "xyzzy-plugh-4711"
OPEN = "looked-at-by-the-test"
WIDTH = 32
ROWS = Rows((5, 3), (0, 0))


@dataclass(frozen=True)
class Watched:
    """The node, its figures before and after a training run, and what the run's own ledger says."""

    server: Server
    status: StatusPort
    before: Series
    after: Series
    report: RunReport
    ledger: Counter[str]
    owner: Path

    def identity(self, name: str) -> Credentials:
        """One of the owner's identities."""
        return Credentials.load(self.owner / name)


@pytest.fixture(scope="package")
def watched(tiny_models: dict[str, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    place = tmp_path_factory.mktemp("watching")
    owner, data, out = place / "owner", place / "rows.jsonl", place / "run"
    certificates.init_authority(owner)
    certificates.issue(owner, "alice")
    row = {"prompt": f"{CANARY}:", "choices": [" no", " yes"], "answer": 1}
    data.write_text(f"{json.dumps(row)}\n" * 16)
    publisher = Credentials.load(owner / "server").signing_key()
    make_emulator(place / "emulators" / "half", tiny_models["llama"], "1:1", publisher)
    flags = ("--certs", str(owner / "server"), "--emulators", str(place / "emulators"), "--log-format", "json")
    flags = ("--cut", "1:1", "--status-port", "0", *flags)
    with serving(tiny_models["llama"], *flags, cache=place / "cache", GRPC_VERBOSITY="NONE") as server:
        status = StatusPort.of(server)
        before = status.series()
        report = run_here(settings(server, data, certs=owner / "alice", steps=4, microbatches=2), out)
        after = status.series()
        alice = Credentials.load(owner / "alice")
        _fetch_emulator(server, alice)
        with _session_that_stays(server, alice) as line:
            line.next()
            line.call(1, pb.PASS_FORWARD, torch.ones(ROWS.tokens, WIDTH), rows=ROWS, keep=True)
            line.answer()
            yield Watched(server, status, before, after, report, _spent(out), owner)
        assert server.process.poll() is None, server.log


@contextmanager
def _session_that_stays(server: Server, credentials: Credentials) -> Iterator[Wire]:
    """As `wire`, without its deadline: these tests take as long as they take."""
    digest = describe(server.address, credentials, Ledger()).model_digest
    with open_channel(server.address, credentials) as channel:
        stub = pb_grpc.BackboneStub(channel)
        line = Wire(cast(pb_grpc.BackboneStub, SimpleNamespace(Exchange=lambda frames, timeout: stub.Exchange(frames))))
        opening = pb.Open(protocol=PROTOCOL, session=OPEN, bottom=1, top=1, model_digest=digest)
        opening.codec_activation = opening.codec_gradient = "none"
        line.send(open=opening)
        yield line
        line.end()


def _fetch_emulator(server: Server, credentials: Credentials) -> None:
    with open_channel(server.address, credentials) as channel:
        stub = pb_grpc.OffsiteStub(channel)
        (offer,) = stub.List(pb.ListRequest(protocol=PROTOCOL)).emulators
        assert sum(len(frame.data) for frame in stub.Fetch(pb.FetchRequest(bundle=offer.bundle))) == offer.bytes


def _spent(out: Path) -> Counter[str]:
    """The sums of ledger.jsonl over all phases; counts only."""
    sums: Counter[str] = Counter()
    for line in (out / "ledger.jsonl").read_text().splitlines():
        sums.update({name: value for name, value in json.loads(line).items() if isinstance(value, int)})
    return sums
