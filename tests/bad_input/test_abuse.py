"""Peers that do not mean well: mutated frames, noise on the port, crowds and stallers. Everybody else is served."""

import contextlib
import queue
import random
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from edge_client.link import Link
from isthmus.errors import LimitError, catalogue
from isthmus.ledger.record import Ledger
from isthmus.trust.address import split_address
from isthmus.wire.gen import backbone_pb2 as pb
from tests.bad_input.raw import Client, RawStream, describe, hidden, identity, opening, request
from tests.harness import Server

EXAMPLES = 150
CROWD = 1000
BATCH = 50
ALLOWED = 64
ROWS = (5, 3)


@pytest.fixture(scope="module")
def serves_others(guarded: Server, owner: Path, card: pb.ModelCard) -> Callable[[], None]:
    """Prove that an edge that means well gets the right answer."""
    alice = identity(owner, "alice")

    def forward(name: str) -> torch.Tensor:
        with Client(guarded.address, alice, opening(card, name)) as client:
            return client.ask(*request(1, [hidden(*ROWS)], rows=ROWS)).tensor.clone()

    expected = forward("abuse-before")
    return lambda: torch.testing.assert_close(forward("abuse-after"), expected, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def others_are_served(serves_others: Callable[[], None]) -> Iterator[None]:
    yield
    serves_others()


def conversation(card: pb.ModelCard, session: str) -> list[bytes]:
    """A correct session: forward and backward, prefill and decode, release, heartbeat, count."""
    place = pb.Sequence(id="s")
    after = pb.Sequence(id="s", start=5, after=2)
    frames = [
        pb.ClientFrame(open=opening(card, session)),
        *request(1, [hidden(*ROWS)], rows=ROWS, keep=True),
        *request(1, [hidden(*ROWS, seed=1)], pb.PASS_BACKWARD),
        *request(2, [hidden(*ROWS)], pb.PASS_DECODE, ROWS, sequence=place),
        *request(3, [hidden(1, 1)], pb.PASS_DECODE, (1, 1), "int8", sequence=after),
        pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=1)),
        pb.ClientFrame(tally=pb.Tally()),
        pb.ClientFrame(release=pb.Release(keys=[pb.Key(microbatch=1)], sequences=["s"])),
    ]
    return [frame.SerializeToString() for frame in frames]


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    kinds = st.sampled_from(("flip", "cut", "drop", "repeat", "swap", "noise", "lengthen"))
    number = st.integers(0, 1 << 20)
    return draw(st.lists(st.tuples(kinds, number, number, st.integers(1, 255)), min_size=1, max_size=4))


def mutated(frames: list[bytes], changes: list[tuple[str, int, int, int]]) -> list[bytes]:
    frames = list(frames)
    for kind, which, where, value in changes:
        if not frames:
            break
        index = which % len(frames)
        frame = bytearray(frames[index])
        # Headers stand at the front: half of the places are among the first bytes.
        place = (where % min(len(frame), 120) if where % 2 else where % len(frame)) if frame else 0
        match kind:
            case "flip" if frame:
                frame[place] ^= value
                frames[index] = bytes(frame)
            case "cut":
                frames[index] = bytes(frame[:place])
            case "lengthen":
                frames[index] = bytes(frame) + random.Random(value).randbytes(value)
            case "noise":
                frames[index] = random.Random(where).randbytes(value)
            case "drop":
                del frames[index]
            case "repeat":
                frames.insert(where % len(frames), bytes(frame))
            case "swap":
                other = where % len(frames)
                frames[index], frames[other] = frames[other], frames[index]
    return frames


def test_mutated_sessions_get_typed_answers_or_a_clean_end(guarded: Server, owner: Path, card: pb.ModelCard) -> None:
    fuzz = identity(owner, "fuzz")
    known = set(catalogue()) - {"internal"}

    @seeded(20)
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @given(changes=mutations(), session=st.integers(0, 7))
    def attack(changes: list[tuple[str, int, int, int]], session: int) -> None:
        with RawStream(guarded.address, fuzz) as stream:
            stream.send(*mutated(conversation(card, f"fuzz-{session}"), changes))
            for frame in stream.finish():
                failure = frame.failure if frame.HasField("failure") else frame.reply.failure
                assert not failure.code or failure.code in known, failure
                assert frame.WhichOneof("body") is not None

    attack()
    assert guarded.process.poll() is None


@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "TLS"])
def test_noise_on_the_port_disturbs_nobody(tls: bool, guarded: Server, servers: dict[str, Server], owner: Path) -> None:
    server, generator = (guarded if tls else servers["llama"]), random.Random(0)
    host, port = split_address(server.address)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for size in (0, 1, 17, 1000, 70_000):
        for start in (b"", preface, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00"):
            with socket.create_connection((host, port), 10) as plain, contextlib.suppress(OSError):
                plain.sendall(start + generator.randbytes(size))
                plain.shutdown(socket.SHUT_WR)
                drain(plain)
    if tls:
        noise_inside_tls(host, port, owner / "fuzz", preface + generator.randbytes(1000))
    credentials = identity(owner, "alice") if tls else None
    assert describe(server.address, credentials).blocks == 6
    assert server.process.poll() is None


def noise_inside_tls(host: str, port: int, folder: Path, noise: bytes) -> None:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
        contextlib.suppress(OSError),
    ):
        secure.sendall(noise)
        drain(secure)


def drain(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def test_a_crowd_of_sessions_meets_the_limit_and_closing_makes_room(
    guarded: Server, owner: Path, card: pb.ModelCard
) -> None:
    crowd = identity(owner, "crowd")
    channel = grpc.secure_channel(guarded.address, crowd.channel())
    held: list[Stream] = []
    refused = 0
    with channel:
        for first in range(0, CROWD, BATCH):
            batch = [Stream(channel, opening(card, f"crowd-{number}")) for number in range(first, first + BATCH)]
            for stream in batch:
                frame = stream.first()
                if frame.HasField("opened"):
                    held.append(stream)
                    continue
                assert frame.failure.code == LimitError.code, frame
                assert "close one" in frame.failure.message
                refused += 1
                stream.close()
        assert (len(held), refused) == (ALLOWED, CROWD - ALLOWED)
        for stream in held:
            stream.close()
        again = [Stream(channel, opening(card, f"again-{number}")) for number in range(ALLOWED)]
        assert all(stream.first().HasField("opened") for stream in again)
        for stream in again:
            stream.close()


class Stream:
    """One of many streams on a shared channel."""

    def __init__(self, channel: grpc.Channel, request: pb.Open) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._outgoing.put(pb.ClientFrame(open=request).SerializeToString())
        self._call = channel.stream_stream(
            "/isthmus.v1.Backbone/Exchange", response_deserializer=pb.ServerFrame.FromString
        )(iter(self._outgoing.get, None))

    def first(self) -> pb.ServerFrame:
        frame: pb.ServerFrame = next(self._call)
        return frame

    def close(self) -> None:
        """End in good order, and wait until the server has ended it too."""
        self._outgoing.put(None)
        assert list(self._call) == []


def test_an_edge_that_ends_its_session_leaves_none_behind(guarded: Server, owner: Path, card: pb.ModelCard) -> None:
    crowd = identity(owner, "crowd")
    for number in range(ALLOWED + 2):
        link = Link(guarded.address, crowd, opening(card, f"orderly-{number}"), Ledger(), card.limits)
        link.open()
        link.close()
    with grpc.secure_channel(guarded.address, crowd.channel()) as channel:
        streams = [Stream(channel, opening(card, f"room-{number}")) for number in range(ALLOWED)]
        assert all(stream.first().HasField("opened") for stream in streams)
        for stream in streams:
            stream.close()


def test_peers_that_stall_hold_up_nobody(
    guarded: Server, owner: Path, card: pb.ModelCard, serves_others: Callable[[], None]
) -> None:
    slow = identity(owner, "slow")
    half = request(1, [hidden(*ROWS)], rows=ROWS)
    tensor = half[1].chunk.data
    half[1].chunk.data = tensor[: len(tensor) // 2]
    with (
        RawStream(guarded.address, slow),  # connects and says nothing
        Client(guarded.address, slow, opening(card, "slow-opened")),  # opens and says nothing more
        Client(guarded.address, slow, opening(card, "slow-half")) as stalled,
    ):
        stalled.stream.send(*half)
        stalled.stream.send(pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=1)))
        assert stalled.stream.receive() is not None  # so the half has arrived
        serves_others()
        rest = pb.Chunk(key=half[1].chunk.key, offset=len(tensor) // 2, data=tensor[len(tensor) // 2 :])
        assert not stalled.ask(pb.ClientFrame(chunk=rest)).code
