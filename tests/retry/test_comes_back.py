"""A session outlives restarts, resets, stalls, and peers that vanish; and no server is stormed meanwhile."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch

from edge_client import silence, stream
from edge_client.retrying import BURST, EACH_S, MOST_BREAKS, Retrying
from edge_client.server import once_it_may, persistently
from edge_client.stalls import answered, arriving
from isthmus.errors import AuditError, LimitError, UnreachableError
from isthmus.wire import options
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.status import read_failure
from isthmus.wire.tensors import pack
from tests.faults.training import wait_until
from tests.retry.lines import (
    WITHIN_S,
    Skipping,
    answering,
    ask,
    line_to,
    link_to,
    most_in_a_minute,
    scripted,
    until_a_call,
)

PROMPT_MS = {"grpc.keepalive_time_ms": 200, "grpc.http2.ping_timeout_ms": 200}
"""In place of the product's 20 seconds each."""


@pytest.fixture
def prompt_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "CLIENT", tuple({**dict(options.CLIENT), **PROMPT_MS}.items()))


@pytest.fixture
def prompt_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"SILENCE_S": 0.1, "ANSWER_WITHIN_S": 0.3, "STUCK_S": 1.0}.items():
        monkeypatch.setattr(silence, name, seconds)
    monkeypatch.setattr(stream, "LOOK_EVERY_S", 0.05)


def holding_first(number: int, frames: Iterator[Any], context: Any) -> Iterator[pb.ServerFrame]:
    """The first stream's call waits for ever, its server otherwise well; later ones are answered."""
    if number > 1:
        yield from answering(number, frames)
        return
    yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
    for frame in frames:
        if isinstance(frame, pb.ClientFrame) and frame.HasField("heartbeat"):
            yield pb.ServerFrame(heartbeat=pb.Heartbeat())


def test_a_reset_is_survived_within_a_few_attempts() -> None:
    retrying = Skipping()
    with scripted(holding_first) as server, line_to(server.port) as line:
        link = link_to(line.address, retrying=retrying)
        pending = ask(link)
        line.reset()
        assert pending.result(WITHIN_S).tensors == []
        link.close()
    assert 1 <= len(retrying.attempts) <= 3


def test_a_server_that_is_restarted_on_its_port_is_found_again() -> None:
    retrying = Skipping(patience_s=1e6)
    with scripted(answering) as server, line_to(1) as line:  # nobody listens at port 1
        with scripted(holding_first) as first:
            line.target = first.port
            link = link_to(line.address, retrying=retrying)
            pending = ask(link)
            line.target = 1
            line.reset()
        wait_until(lambda: len(retrying.attempts) >= 3, "attempts in vain")
        line.target = server.port
        assert pending.result(WITHIN_S).tensors == []
        link.close()
    assert most_in_a_minute(retrying.attempts) <= BURST + 60 / EACH_S + 1


def test_a_peer_that_vanished_without_a_word_is_found_by_pings(
    prompt_pings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "LOOK_EVERY_S", WITHIN_S)  # the session's own looking for silence finds nothing here
    with (
        scripted(holding_first, **{"http2.min_recv_ping_interval_without_data_ms": 10}) as server,
        line_to(server.port) as line,
    ):
        link = link_to(line.address, retrying=Skipping())
        pending = ask(link)
        wait_until(lambda: server.streams == 1, "the session")
        line.swallow()
        wait_until(lambda: line.comers > 1, "the edge to find out and come again")
        line.heal()
        assert pending.result(WITHIN_S).tensors == []
        link.close()


def test_a_server_that_stops_in_mid_tensor_is_left_and_asked_again(prompt_silence: None) -> None:
    """Its gRPC answers pings all the time."""

    def stopping(number: int, frames: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.ServerFrame]:
        if number > 1:
            yield from answering(number, frames)
            return
        yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
        call, (header, payload) = until_a_call(frames), pack_of_ones()
        yield pb.ServerFrame(reply=pb.Reply(key=call.key, tensors=[header]))
        yield pb.ServerFrame(chunk=pb.Chunk(key=call.key, data=bytes(payload[: payload.nbytes // 2])))
        wait_until(lambda: not context.is_active(), "the edge to leave")

    with scripted(stopping) as server:
        link = link_to(f"127.0.0.1:{server.port}", retrying=Skipping())
        assert ask(link).result(WITHIN_S).tensors == []
        link.close()
    assert server.streams == 2


def pack_of_ones() -> tuple[pb.Tensor, memoryview]:
    return pack(torch.ones(1024), "none")


def test_a_server_that_takes_nothing_more_is_left_and_asked_again(prompt_silence: None) -> None:
    """Its gRPC answers pings all the time, and the request is larger than what a connection holds."""

    def deaf(number: int, frames: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.ServerFrame]:
        if number > 1:
            yield from answering(number, frames)
            return
        yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
        wait_until(lambda: not context.is_active(), "the edge to leave")

    with scripted(deaf, max_receive_message_length=-1) as server:
        link = link_to(f"127.0.0.1:{server.port}", retrying=Skipping())
        assert ask(link, values=8 << 20).result(WITHIN_S).tensors == []
        link.close()
    assert server.streams == 2


def test_a_connection_that_is_told_to_go_away_is_replaced() -> None:
    """The server ends connections by age; the stream's grace is as short."""
    with scripted(holding_first, max_connection_age_ms=300, max_connection_age_grace_ms=300) as server:
        link = link_to(f"127.0.0.1:{server.port}", retrying=Skipping())
        assert ask(link).result(WITHIN_S).tensors == []
        link.close()
    assert server.streams >= 2


def test_a_server_that_takes_every_session_and_drops_it_is_not_stormed_and_given_up() -> None:
    def dropping(number: int, frames: Iterator[Any], context: Any) -> Iterator[pb.ServerFrame]:
        yield pb.ServerFrame(opened=pb.Opened(server_version="x"))

    retrying = Skipping()
    with scripted(dropping) as server:
        link = link_to(f"127.0.0.1:{server.port}", retrying=retrying)
        with pytest.raises(UnreachableError, match=f"broke {MOST_BREAKS + 1} times"):
            ask(link).result(WITHIN_S)
        with pytest.raises(UnreachableError):
            ask(link, 2)
        link.close()
        assert server.streams == len(retrying.attempts) + 1 == MOST_BREAKS + 1
    assert most_in_a_minute(retrying.attempts) <= BURST + 60 / EACH_S + 1


def test_a_server_that_drops_after_each_answer_is_not_stormed_either() -> None:
    def fickle(number: int, frames: Iterator[Any], context: Any) -> Iterator[pb.ServerFrame]:
        yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
        yield pb.ServerFrame(reply=pb.Reply(key=until_a_call(frames).key))

    retrying = Skipping()
    with scripted(fickle) as server:
        link = link_to(f"127.0.0.1:{server.port}", retrying=retrying)
        for number in range(60):
            assert ask(link, number).result(WITHIN_S).tensors == []
        link.close()
    assert most_in_a_minute(retrying.attempts) <= BURST + 60 / EACH_S + 1


def told_when(message: pb.Failure) -> Exception:
    """What is read of a failure that says when to come again."""
    error = read_failure(message)
    error.retry_after_s = 30.0
    return error


FULL = pb.Failure(code=LimitError.code, message="full; come again")


def test_a_session_that_is_refused_until_later_is_opened_then(monkeypatch: pytest.MonkeyPatch) -> None:
    def full_first(number: int, frames: Iterator[Any], context: Any) -> Iterator[pb.ServerFrame]:
        if number == 1:
            yield pb.ServerFrame(failure=FULL)
        else:
            yield from answering(number, frames)

    monkeypatch.setattr("edge_client.link.read_failure", told_when)
    retrying = Skipping()
    with scripted(full_first) as server:
        link = link_to(f"127.0.0.1:{server.port}", retrying=retrying)
        retrying.skipped = 1000  # a session may be opened long after there is a link
        assert ask(link).result(WITHIN_S).tensors == []
        link.close()
    assert 1030 <= retrying.skipped <= 1040


def test_a_request_that_is_refused_until_later_is_sent_again_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def limiting(number: int, frames: Iterator[Any], context: Any) -> Iterator[pb.ServerFrame]:
        yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
        for frame in frames:
            if isinstance(frame, pb.ClientFrame) and frame.HasField("call"):
                asked.append(frame.call.key.microbatch)
                failure = FULL if len(asked) < 3 else None
                yield pb.ServerFrame(reply=pb.Reply(key=frame.call.key, failure=failure))

    monkeypatch.setattr("edge_client.pending.read_failure", told_when)
    monkeypatch.setattr("edge_client.retrying.LATER", (0.0, 0.0))
    with scripted(limiting) as server:
        link = link_to(f"127.0.0.1:{server.port}")
        assert ask(link, 7).result(WITHIN_S).tensors == []
        link.close()
    assert asked == [7, 7, 7]
    assert server.streams == 1


def test_a_request_that_is_refused_for_now_without_a_time_is_sent_again_on_a_stream_that_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    failure = pb.Failure(code=AuditError.code, message="the disk is full")

    def forgetful(number: int, frames: Iterator[Any], context: Any) -> Iterator[pb.ServerFrame]:
        yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
        for frame in frames:
            if isinstance(frame, pb.ClientFrame) and frame.HasField("call"):
                asked.append(frame.call.key.microbatch)
                yield pb.ServerFrame(reply=pb.Reply(key=frame.call.key, failure=failure if len(asked) < 3 else None))

    monkeypatch.setattr("edge_client.link.SOON_S", 0.01)
    with scripted(forgetful) as server:
        link = link_to(f"127.0.0.1:{server.port}")
        assert ask(link, 7).result(WITHIN_S).tensors == []
        link.close()
    assert asked == [7, 7, 7]
    assert server.streams == 1


def test_a_call_that_is_refused_until_later_is_made_then(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("edge_client.server.time.sleep", slept.append)

    def once() -> str:
        if len(slept) < 2:
            raise told_when(FULL)
        return "a card"

    assert once_it_may(once, Retrying(60)) == "a card"
    assert all(30 <= each <= 37.5 for each in slept)
    with pytest.raises(UnreachableError):
        once_it_may(once_gone, Retrying(60))
    assert len(slept) == 2


def test_a_fetch_goes_on_as_long_as_it_gets_further(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("edge_client.server.time.sleep", slept.append)
    reached = 0

    def once() -> str:
        nonlocal reached
        if reached == 20:
            return "all"
        reached += 1
        raise UnreachableError("broke")

    assert persistently(once, lambda: reached) == "all"
    assert len(slept) == 20
    assert all(0.5 <= each <= 1.5 for each in slept)
    with pytest.raises(UnreachableError):
        persistently(once_gone, lambda: 0)
    assert len(slept) == 24
    assert slept[23] > slept[20]


def once_gone() -> str:
    raise UnreachableError("gone")


def test_a_fetch_that_brings_nothing_more_is_ended() -> None:
    def first_alone(number: int, frames: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.ServerFrame]:
        yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
        wait_until(lambda: not context.is_active(), "the edge to leave")

    with scripted(first_alone) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.stream_stream("/isthmus.v1.Backbone/Exchange", bytes, bytes)(iter(()))
        messages = arriving(call, within_s=0.3)
        assert next(messages)
        with pytest.raises(grpc.RpcError) as caught:
            next(messages)
    assert caught.value.code() is grpc.StatusCode.CANCELLED


def test_an_upload_that_is_never_answered_is_ended() -> None:
    def deaf(number: int, frames: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.ServerFrame]:
        wait_until(lambda: not context.is_active(), "the edge to leave")
        yield pb.ServerFrame()

    with scripted(deaf) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        submit = channel.stream_unary("/isthmus.v1.Backbone/Exchange", bytes, bytes)
        with pytest.raises(UnreachableError, match="taken nothing and said nothing"):
            answered(submit.future, [b""] * 2, within_s=0.3)
