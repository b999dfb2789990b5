"""An answer that no honest edge gives, or one that never comes, costs at most the request that asked."""

import re
from collections.abc import Callable

import pytest
import torch

from cloud_node.asks import IGNORED
from isthmus.errors import catalogue
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack
from tests.bad_input.ports.conftest import Connect, assert_goes_on
from tests.bad_input.raw import hidden, request
from tests.dlora.frames import (
    ROWS,
    Asked,
    Frames,
    PortClient,
    answer,
    backward,
    chunks,
    forward,
    poisoned,
    port_opening,
)
from tests.faults.training import wait_until
from tests.harness import Server


def changed(asked: Asked, **fields: object) -> Frames:
    """A due answer whose first header claims something else."""
    head, *rest = answer(asked, asked.due)
    for name, value in fields.items():
        setattr(head.port.tensors[0], name, value)
    return [head, *rest]


def rechunked(asked: Asked, *pieces: tuple[int, bytes]) -> Frames:
    """A due answer's header, then other chunks."""
    made = [pb.Chunk(key=asked.header.key, offset=at, data=data) for at, data in pieces]
    return [answer(asked, asked.due)[0], *(pb.ClientFrame(chunk=chunk) for chunk in made)]


BAD_ANSWERS: dict[str, Callable[[Asked], Frames]] = {
    "no tensors": lambda asked: answer(asked, []),
    "a tensor too few": lambda asked: answer(asked, asked.due[1:]),
    "a tensor too many": lambda asked: answer(asked, [*asked.due, asked.due[0]]),
    "a thousand tensors": lambda asked: answer(asked, [torch.zeros(1, 1)] * 1000),
    "another width": lambda asked: answer(asked, [part[:, :-1].contiguous() for part in asked.due]),
    "another number of tokens": lambda asked: answer(asked, [part[:-1] for part in asked.due]),
    "one dimension": lambda asked: answer(asked, [part.view(-1) for part in asked.due]),
    "the tensors in another order": lambda asked: answer(asked, asked.due[::-1]),
    "integers": lambda asked: answer(asked, [part.to(torch.int64) for part in asked.due]),
    "NaN": lambda asked: poisoned(answer(asked, asked.due), float("nan")),
    "infinity": lambda asked: poisoned(answer(asked, asked.due), float("inf")),
    "a wrong checksum": lambda asked: changed(asked, checksum=1),
    "an unknown codec": lambda asked: changed(asked, codec="zstd"),
    "an unknown dtype": lambda asked: changed(asked, dtype="complex128"),
    "a declared size that is too small": lambda asked: changed(asked, size=8),
    "a declared size that is too large": lambda asked: changed(asked, size=1 << 60),
    "a gap between chunks": lambda asked: rechunked(asked, (0, b"\0" * 8), (16, b"\0" * 8)),
    "bytes twice": lambda asked: rechunked(asked, (0, b"\0" * 8), (0, b"\0" * 8)),
    "an empty chunk": lambda asked: rechunked(asked, (0, b"")),
    "more bytes than declared": lambda asked: rechunked(asked, (0, b"\0" * (1 << 16))),
}


@pytest.mark.parametrize("make", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_bad_answer_at_a_port_costs_the_request_that_asked(
    connect: Connect, expected: tuple[torch.Tensor, torch.Tensor], make: Callable[[Asked], Frames]
) -> None:
    with connect() as client:
        asked = client.begin(*forward())
        client.stream.send(*make(asked))
        assert_is_refused(client)
        assert_goes_on(client, expected)


@pytest.mark.parametrize("fault", ["no tensors", "a tensor too many", "another width", "NaN", "a gap between chunks"])
def test_so_does_one_in_a_backward(connect: Connect, expected: tuple[torch.Tensor, torch.Tensor], fault: str) -> None:
    with connect() as client:
        client.through(*forward())
        asked = client.begin(*backward())
        client.stream.send(*BAD_ANSWERS[fault](asked))
        assert_is_refused(client)
        assert_goes_on(client, expected)


def assert_is_refused(client: PortClient) -> None:
    refused = client.reply()
    assert refused.code == "wire"
    assert refused.reply.key.microbatch == 1
    assert len(refused.reply.failure.message.splitlines()) == 1


def keyed(asked: Asked, microbatch: int, kind: int) -> Frames:
    """A due answer under another key."""
    key = pb.Key(microbatch=microbatch, pass_kind=kind)  # type: ignore[arg-type]
    packed = [pack(part, "none") for part in asked.due]
    given = pb.PortAnswer(key=key, turn=asked.header.turn, tensors=[header for header, _ in packed])
    frames = [pb.ClientFrame(port=given)]
    return frames if kind not in PORTS else [*frames, *chunks(key, [payload for _, payload in packed])]


PORTS = (pb.PASS_FORWARD_PORT, pb.PASS_BACKWARD_PORT, pb.PASS_DECODE_PORT)

TO_NOTHING: dict[str, Callable[[Asked], Frames]] = {
    "a turn to come": lambda asked: answer(asked, asked.due, turn=asked.header.turn + 1),
    "turn 0": lambda asked: answer(asked, asked.due, turn=0),
    "another microbatch": lambda asked: keyed(asked, 99, pb.PASS_FORWARD_PORT),
    "the ports of another pass": lambda asked: keyed(asked, 1, pb.PASS_BACKWARD_PORT),
    "a pass that has no ports": lambda asked: keyed(asked, 1, pb.PASS_FORWARD),
    "no pass": lambda asked: keyed(asked, 1, 0),
    "an unknown pass": lambda asked: keyed(asked, 1, 77),
    "chunks alone": lambda asked: answer(asked, asked.due)[1:],
}


@pytest.mark.parametrize("make", TO_NOTHING.values(), ids=TO_NOTHING)
def test_an_answer_to_no_open_question_is_nothing(
    connect: Connect, expected: tuple[torch.Tensor, torch.Tensor], make: Callable[[Asked], Frames]
) -> None:
    with connect() as client:
        asked = client.begin(*forward())
        client.stream.send(*make(asked))
        assert client.is_alive()
        output, _ = client.through(*answer(asked, asked.due))
        assert torch.equal(output.tensor, expected[0])


def test_an_answer_before_any_question_or_given_twice_is_nothing(
    connect: Connect, expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with connect() as client:
        first = client.begin(*forward())
        due = answer(first, first.due)
        other = answer(first, [2 * part for part in first.due])
        output, _ = client.through(*due, *other)
        client.stream.send(*due)
        assert torch.equal(output.tensor, expected[0])
        assert_goes_on(client, expected)
    with connect() as client:
        client.stream.send(*due, *due)
        assert_goes_on(client, expected)


def test_a_half_given_answer_begun_anew_is_the_one_that_counts(
    connect: Connect, expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with connect() as client:
        asked = client.begin(*forward())
        client.stream.send(*answer(asked, [2 * part for part in asked.due])[:-1])
        output, _ = client.through(*answer(asked, asked.due))
        assert torch.equal(output.tensor, expected[0])


def test_answers_to_nothing_without_end_end_the_stream(connect: Connect) -> None:
    with connect() as client:
        given = pb.PortAnswer(key=pb.Key(microbatch=1, pass_kind=pb.PASS_FORWARD_PORT), turn=1)
        client.stream.send(*[pb.ClientFrame(port=given)] * (IGNORED + 1))
        assert client.ending().code == "wire"


def test_a_session_without_ports_may_answer_nothing(connect: Connect) -> None:
    with connect(ports=[], codec_port="") as client:
        client.stream.send(pb.ClientFrame(port=pb.PortAnswer(key=pb.Key(microbatch=1, pass_kind=4), turn=1)))
        assert client.is_alive()
        output, asked = client.through(*request(1, [hidden(*ROWS)], rows=ROWS))
        assert not asked
        assert not output.code


def test_a_client_that_stops_sending_while_a_pass_waits_is_not_waited_for(
    guarded: Server, credentials: Credentials, card: pb.ModelCard
) -> None:
    """Nothing can answer at a port any more: the request ends in words, and then the stream."""
    client = PortClient(guarded.address, credentials, port_opening(card))
    client.begin(*forward())
    (frame,) = client.stream.finish()
    assert catalogue()[frame.reply.failure.code].retryable, frame
    client.leave()


def test_a_client_that_vanishes_while_a_pass_waits_leaves_nothing_behind(
    guarded: Server, credentials: Credentials, card: pb.ModelCard
) -> None:
    client = PortClient(guarded.address, credentials, port_opening(card, "vanished"))
    client.begin(*forward())
    client.leave()
    with PortClient(guarded.address, credentials, port_opening(card, "vanished")):
        pass  # it comes back, and goes in good order
    wait_until(lambda: re.search("session vanished of .* closed", guarded.log) is not None, "the session's end")
    assert "Traceback" not in guarded.log
