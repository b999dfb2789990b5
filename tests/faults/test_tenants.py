"""Two data owners on one server: each learns as if alone, and neither reaches what is the other's."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

import pytest
import torch

from edge_client.config import TrainConfig
from isthmus.rows import Rows
from isthmus.trust.certificates import init_authority, issue
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from tests.faults.frames import Wire, wire
from tests.faults.training import learning, same_bits, settings
from tests.harness import Server, serving, write_rows

TURNS = 12
WIDTH = 32


@dataclass(frozen=True)
class Owned:
    """A server that trusts two identities."""

    server: Server
    one: Path
    other: Path


@pytest.fixture(scope="module")
def owned(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Owned]:
    certs = tmp_path_factory.mktemp("owned") / "certs"
    init_authority(certs)
    one, other = issue(certs, "hospital"), issue(certs, "bank")
    flags = ("--cut", "1:1", "--certs", str(certs / "server"))
    with serving(tiny_models["llama"], *flags, cache=tmp_path_factory.mktemp("tenants")) as server:
        yield Owned(server, one, other)


def tenants(owned: Owned, rows: Path, elsewhere: Path) -> list[TrainConfig]:
    """Two owners with different certificates, data, seeds, ranks and numbers of microbatches."""
    return [
        settings(owned.server, rows, certs=owned.one, seed=1, microbatches=2),
        settings(owned.server, write_rows(elsewhere, seed=5), certs=owned.other, seed=2, rank=4, microbatches=3),
    ]


def test_two_tenants_at_once_each_get_bit_for_bit_what_they_get_alone(owned: Owned, rows: Path, tmp_path: Path) -> None:
    configs = tenants(owned, rows, tmp_path / "other.jsonl")
    alone = []
    for config in configs:
        with learning(config) as learner:
            for number in range(TURNS):
                learner.step(number)
            alone.append(learner.values)

    together = Barrier(2, timeout=60)
    with ExitStack() as both, ThreadPoolExecutor(2) as pool:
        learners = [both.enter_context(learning(config)) for config in configs]

        def learn(which: int) -> None:
            for number in range(TURNS):
                together.wait()
                learners[which].step(number)

        list(pool.map(learn, range(2)))
        values = [learner.values for learner in learners]
    assert not same_bits(alone[0], alone[1])
    assert same_bits(values[0], alone[0])
    assert same_bits(values[1], alone[1])


@dataclass(frozen=True)
class Streams:
    """One identity's open session, and the other identity's certificate."""

    mine: Wire
    address: str
    theirs: Credentials
    hidden_ND: torch.Tensor
    rows: Rows


@pytest.fixture
def streams(owned: Owned, request: pytest.FixtureRequest) -> Iterator[Streams]:
    hidden_ND, rows = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0)), Rows((6, 4), (0, 0))
    session = f"session-of-{request.node.name[:40]}"
    with wire(owned.server.address, Credentials.load(owned.one), session) as mine:
        assert mine.next().HasField("opened")
        mine.call(1, pb.PASS_FORWARD, hidden_ND, rows=rows, keep=True)
        assert mine.answer()[0].kept
        yield Streams(mine, owned.server.address, Credentials.load(owned.other), hidden_ND, rows)


def session_of(request: pytest.FixtureRequest) -> str:
    return f"session-of-{request.node.name[:40]}"


def still_kept(streams: Streams) -> bool:
    """Whether the first identity's backward needs nothing but its gradient."""
    streams.mine.call(1, pb.PASS_BACKWARD, torch.ones(10, WIDTH))
    reply, payload = streams.mine.answer()
    return not reply.HasField("failure") and reply.cost.recompute_flops == 0 and len(payload) == 10 * WIDTH * 4


def test_a_session_is_refused_to_another_identity_and_stays_its_owners(
    streams: Streams, request: pytest.FixtureRequest
) -> None:
    with wire(streams.address, streams.theirs, session_of(request)) as thief:
        assert thief.next().failure.code == "owner"
        assert not list(thief)
    assert still_kept(streams)


def test_another_identity_cannot_use_activations_by_naming_their_microbatch(streams: Streams) -> None:
    with wire(streams.address, streams.theirs, "a-session-of-its-own") as thief:
        assert thief.next().HasField("opened")
        thief.call(1, pb.PASS_BACKWARD, torch.ones(10, WIDTH))
        reply, payload = thief.answer()
        assert reply.failure.code == "not-kept"
        assert not payload
    assert still_kept(streams)


def test_another_identity_cannot_release_activations_by_naming_their_microbatch(streams: Streams) -> None:
    with wire(streams.address, streams.theirs, "a-session-that-releases") as thief:
        assert thief.next().HasField("opened")
        thief.send(release=pb.Release(keys=[pb.Key(microbatch=1)]))
        thief.send(heartbeat=pb.Heartbeat(nonce=7))
        assert thief.next().heartbeat.nonce == 7
    assert still_kept(streams)


def test_its_owner_can_release_them(streams: Streams) -> None:
    streams.mine.send(release=pb.Release(keys=[pb.Key(microbatch=1)]))
    assert not still_kept(streams)


def test_the_owner_finds_its_session_again_on_another_stream(
    owned: Owned, streams: Streams, request: pytest.FixtureRequest
) -> None:
    with wire(streams.address, Credentials.load(owned.one), session_of(request)) as again:
        assert again.next().HasField("opened")
        assert streams.mine.next().failure.code == "draining"
        again.call(1, pb.PASS_BACKWARD, torch.ones(10, WIDTH))
        reply, _ = again.answer()
        assert not reply.HasField("failure")
        assert reply.cost.recompute_flops == 0
