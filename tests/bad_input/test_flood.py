"""What a connection may do before anybody looks at what it says: pings, headers, streams, messages, silence."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from cloud_node import listening
from cloud_node.audit import Audit
from cloud_node.revoked import Revoked
from cloud_node.service import BackboneService
from cloud_node.watch import Watch
from isthmus import PROTOCOL
from isthmus.trust.credentials import Credentials
from isthmus.wire import options
from isthmus.wire.frames import Chunk
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from tests.bad_input import http2
from tests.bad_input.raw import describe, identity
from tests.harness import Server

PROMPT = {
    "grpc.server_handshake_timeout_ms": 300,
    "grpc.max_connection_idle_ms": 300,
    "grpc.max_connection_age_ms": 300,
}
"""In place of 20 s, 5 minutes and an hour."""


@pytest.fixture(autouse=True)
def server_stays_up(servers: dict[str, Server]) -> Iterator[None]:
    """Whatever one connection does, another is answered afterwards."""
    yield
    assert describe(servers["llama"].address, None).protocol == PROTOCOL
    assert servers["llama"].process.poll() is None


@pytest.fixture
def address(servers: dict[str, Server]) -> str:
    return servers["llama"].address


@contextmanager
def prompt_server(
    patch: pytest.MonkeyPatch, credentials: Credentials | None = None, listen: str = "127.0.0.1:0"
) -> Iterator[str]:
    """A node's server with the product's options but for `PROMPT`; it opens every session and echoes heartbeats."""
    patch.setattr(options, "SERVER", tuple({**dict(options.SERVER), **PROMPT}.items()))
    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), []

    async def exchange(frames: AsyncIterator[pb.ClientFrame | Chunk], context: Any) -> AsyncIterator[pb.ServerFrame]:
        async for frame in frames:
            yield pb.ServerFrame(heartbeat=cast(pb.ClientFrame, frame).heartbeat)

    async def card(request: pb.DescribeRequest, context: Any) -> pb.ModelCard:
        return pb.ModelCard(protocol=PROTOCOL)

    async def serve() -> None:
        counting = {"watch": Watch(), "audit": Audit(), "revoked": Revoked(None)}
        service = SimpleNamespace(**counting, Describe=card, FetchEnds=card, Exchange=exchange)
        server, port = await listening.serve(cast(BackboneService, service), listen, credentials)
        ports.append(port)
        ready.set()
        await stopping.wait()
        await server.stop(0)

    stopping = asyncio.Event()
    running = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    running.start()
    assert ready.wait(20)
    try:
        yield f"127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(stopping.set)
        running.join(20)


def test_a_server_says_what_it_bears(address: str) -> None:
    with http2.Connection(address) as line:
        said = http2.settings(line.until(http2.SETTINGS).payload)
    assert said[http2.MAX_CONCURRENT_STREAMS] == 256
    assert said[http2.MAX_HEADER_LIST_SIZE] == 8 << 10


def test_a_flood_of_pings_ends_its_connection(address: str) -> None:
    with http2.Connection(address) as line:
        line.send(*[http2.frame(http2.PING, payload=bytes(8))] * 1000)
        away = [each for each in line.frames() if each.kind == http2.GOAWAY]
    assert http2.ENHANCE_YOUR_CALM in [http2.code(each) for each in away]
    assert b"too_many_pings" in away[-1].payload


def test_an_edge_pings_less_often_than_a_server_bears() -> None:
    client, server = dict(options.CLIENT), dict(options.SERVER)
    assert client["grpc.keepalive_time_ms"] > server["grpc.http2.min_recv_ping_interval_without_data_ms"]


@pytest.mark.parametrize("size", [8 << 10, 12 << 10, 1 << 20])
def test_metadata_of_more_than_8_kib_is_refused_whatever_it_is(address: str, size: int) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.BackboneStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Describe(pb.DescribeRequest(protocol=PROTOCOL), metadata=[("x", "a" * size)], timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        few = stub.Describe(pb.DescribeRequest(protocol=PROTOCOL), metadata=[("x", "a" * 4096)], timeout=20)
    assert few.protocol == PROTOCOL


def test_headers_that_never_end_are_cut_off(address: str) -> None:
    piece = b"".join(http2.literal(f"x-{number}", "a" * 1000) for number in range(16))
    with http2.Connection(address) as line:
        line.send(http2.frame(http2.HEADERS, 1, 0, http2.call("Describe")))
        for _ in range(1000):
            line.send(http2.frame(http2.CONTINUATION, 1, 0, piece[: 16 << 10]))
        line.send(http2.frame(http2.CONTINUATION, 1, http2.END_HEADERS))
        ended = next(each for each in line.frames() if each.kind in (http2.GOAWAY, http2.RST_STREAM, http2.HEADERS))
    assert ended.kind in (http2.GOAWAY, http2.RST_STREAM) or b"grpc-status" in ended.payload


def test_more_streams_than_256_are_refused_one_by_one(address: str) -> None:
    with http2.Connection(address) as line:
        begin = http2.call("Exchange")
        line.until(http2.SETTINGS)
        line.send(http2.frame(http2.SETTINGS, flags=http2.ACK))  # a limit holds from its acknowledgement on
        line.send(*(http2.frame(http2.HEADERS, 1 + 2 * each, http2.END_HEADERS, begin) for each in range(300)))
        refused = set()
        for each in line.frames():
            if each.kind == http2.RST_STREAM and http2.code(each) == http2.REFUSED_STREAM:
                refused.add(each.stream)
            if len(refused) == 44:
                break
    assert min(refused) == 1 + 2 * 256


def test_streams_begun_and_reset_at_once_harm_nobody(address: str) -> None:
    begin, cancel = http2.call("Exchange"), (8).to_bytes(4, "big")
    with http2.Connection(address) as line:
        for each in range(1, 6000, 2):
            line.send(http2.frame(http2.HEADERS, each, http2.END_HEADERS, begin))
            line.send(http2.frame(http2.RST_STREAM, each, 0, cancel))
    assert describe(address, None).protocol == PROTOCOL


def test_a_message_larger_than_4_mib_is_refused_by_its_first_bytes(address: str) -> None:
    announced = b"\0" + (1 << 30).to_bytes(4, "big")
    with http2.Connection(address) as line:
        line.send(http2.frame(http2.HEADERS, 1, http2.END_HEADERS, http2.call("Describe")))
        line.send(http2.frame(http2.DATA, 1, 0, announced))
        answer = next(each for each in line.frames() if each.stream == 1)
    assert answer.kind in (http2.HEADERS, http2.RST_STREAM)
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.BackboneStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Describe(pb.DescribeRequest(client_version="a" * (5 << 20)), timeout=20)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("secure", [False, True])
def test_who_says_nothing_is_dropped(
    secure: bool, guarded: Server, owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = identity(owner, "server") if secure else None
    with prompt_server(monkeypatch, credentials) as there:
        host, _, port = there.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as line:
            while line.recv(1 << 10):  # its settings, and then its end
                pass


def test_a_connection_without_a_call_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with prompt_server(monkeypatch) as there, http2.Connection(there) as line:
        assert http2.GOAWAY in [each.kind for each in line.frames()]


def test_a_session_outlives_the_age_of_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with prompt_server(monkeypatch) as there, grpc.insecure_channel(there) as channel:
        heard, going = threading.Semaphore(0), threading.Event()

        def beats() -> Iterator[pb.ClientFrame]:
            for number in range(1, 100):
                yield pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=number))
                heard.acquire(timeout=20)
                if number > 10 or going.wait(0.1):  # twice as long as the connection may be
                    return

        answered = []
        for frame in pb_grpc.BackboneStub(channel).Exchange(beats()):
            answered.append(frame.heartbeat.nonce)
            heard.release()
    assert answered == list(range(1, 12))


def test_no_more_calls_are_taken_than_a_node_bears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "CALLS", 1)
    with prompt_server(monkeypatch) as there, grpc.insecure_channel(there) as channel:
        over, stub = threading.Event(), pb_grpc.BackboneStub(channel)

        def stays() -> Iterator[pb.ClientFrame]:
            yield pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=1))
            over.wait(20)

        first = stub.Exchange(stays())
        assert next(first).heartbeat.nonce == 1
        with pytest.raises(grpc.RpcError) as caught:
            stub.Describe(pb.DescribeRequest(protocol=PROTOCOL), timeout=20)
        over.set()
        assert list(first) == []
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
