"""A session that waits for nothing outlives its server's absence; one that waits for an answer has its patience."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch

from cloud_node.calls import Limits
from edge_client.link import Link, Received
from isthmus import PROTOCOL
from isthmus.errors import UnreachableError
from isthmus.ledger.record import Ledger
from isthmus.wire.frames import EXCHANGE, read_client_frame, serialise
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack
from tests.faults.training import wait_until

PATIENCE_S = 0.5
WITHIN_S = 30.0


class Comer:
    """A server that comes to one address and goes; it answers every call with nothing, or none."""

    def __init__(self, answers: bool = True) -> None:
        self.opened = 0
        self._answers = answers
        self._server: grpc.Server | None = None
        self._port = 0
        self.come()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def come(self) -> None:
        handler = grpc.stream_stream_rpc_method_handler(self._exchange, read_client_frame, serialise)
        self._server = grpc.server(ThreadPoolExecutor(2))
        service, method = EXCHANGE.strip("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self._server.start()

    def go(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    def _exchange(self, sent: Iterator[Any], _: Any) -> Iterator[pb.ServerFrame]:
        self.opened += 1
        yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
        for frame in sent:
            if self._answers and isinstance(frame, pb.ClientFrame) and frame.HasField("call"):
                yield pb.ServerFrame(reply=pb.Reply(key=frame.call.key))


@pytest.fixture
def comer() -> Iterator[Comer]:
    comer = Comer()
    yield comer
    comer.go()


def link_to(address: str, patience_s: float = PATIENCE_S) -> Link:
    return Link(address, None, pb.Open(protocol=PROTOCOL, session="s"), Ledger(), Limits().to_wire(), patience_s)


def ask(link: Link, microbatch: int) -> "Future[Received]":
    header, payload = pack(torch.ones(2, 32), "none")
    key = pb.Key(microbatch=microbatch, pass_kind=pb.PASS_FORWARD)
    call = pb.Call(key=key, tensors=[header], rows=pb.Rows(row_lengths=[2]))
    return link.request(call, [payload], "train")


def test_an_idle_session_answers_again_however_long_its_server_was_gone(comer: Comer) -> None:
    link = link_to(comer.address)
    for number in (1, 2):
        assert ask(link, number).result(WITHIN_S).tensors == []
        comer.go()
        time.sleep(4 * PATIENCE_S)
        comer.come()
    assert ask(link, 3).result(WITHIN_S).tensors == []
    assert comer.opened == 3
    link.close()


def test_a_request_after_an_idle_loss_waits_for_the_server_as_long_as_the_patience(comer: Comer) -> None:
    link = link_to(comer.address)
    ask(link, 1).result(WITHIN_S)
    comer.go()
    time.sleep(2 * PATIENCE_S)
    with pytest.raises(UnreachableError, match="no answer for"):
        ask(link, 2).result(WITHIN_S)
    link.close()


def test_a_session_with_something_pending_fails_after_the_patience() -> None:
    silent = Comer(answers=False)
    link = link_to(silent.address)
    pending = ask(link, 1)
    wait_until(lambda: silent.opened == 1, "the session")
    silent.go()
    lost = time.monotonic()
    with pytest.raises(UnreachableError, match="no answer for"):
        pending.result(WITHIN_S)
    assert time.monotonic() - lost >= PATIENCE_S / 2
    link.close()


def test_a_session_that_was_never_opened_fails_at_once(comer: Comer) -> None:
    comer.go()
    link = link_to(comer.address, patience_s=20)
    begun = time.monotonic()
    with pytest.raises(UnreachableError, match="nothing listens"):
        ask(link, 1)
    assert time.monotonic() - begun < 10
    link.close()


def test_a_request_that_meets_an_idle_loss_between_opening_and_queueing_is_not_lost(comer: Comer) -> None:
    class Losing(Link):
        """Loses its stream, as an idle one may, just after it was opened."""

        lost = False

        def open(self) -> None:
            super().open()
            if not self.lost and self._stream is not None:
                self.lost = True
                comer.go()
                wait_until(lambda: self._keeper is None, "the loss")
                comer.come()

    link = Losing(comer.address, None, pb.Open(protocol=PROTOCOL, session="s"), Ledger(), Limits().to_wire(), WITHIN_S)
    assert ask(link, 1).result(WITHIN_S).tensors == []
    assert link.lost
    link.close()


def test_a_link_that_is_closed_answers_no_request(comer: Comer) -> None:
    link = link_to(comer.address)
    link.close()
    with pytest.raises(UnreachableError, match="closed"):
        ask(link, 1)
    assert comer.opened == 0
