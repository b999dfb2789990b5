"""What a session that only runs forward is refused, each by name, and what others notice of it: nothing."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from isthmus.ports import Port, projection
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import unpack
from tests.bad_input.raw import Answer, Client, RawStream, describe, hidden, opening, request
from tests.harness import Server
from tests.parity.reference import BLOCKS, HIDDEN

ROWS = (5, 3)
CUT = {"bottom": 1, "top": 1}
TAPS = [Port(1, 8), Port(3, HIDDEN)]
OTHER_TAPS = [Port(2, 5)]

Connect = Callable[..., Client]
Make = Callable[[], list[pb.ClientFrame]]


@pytest.fixture(scope="module")
def card(nodes: dict[str, Server]) -> pb.ModelCard:
    return describe(nodes["llama"].address, None)


_names = itertools.count()


def opened_with(card: pb.ModelCard, ports: Sequence[Port | pb.Port], **changes: object) -> pb.Open:
    """What a good client with these ports opens its session with, except for `changes`."""
    wire = [port.to_wire() if isinstance(port, Port) else port for port in ports]
    usual = {**CUT, "forward_only": True, "ports": wire, "codec_port": "none" if wire else ""}
    return opening(card, f"forward-only-{next(_names)}", **{**usual, **changes})


@pytest.fixture(scope="module")
def connect(nodes: dict[str, Server], card: pb.ModelCard) -> Connect:
    """Open a session of a name of its own."""

    def open_session(*ports: Port, **changes: object) -> Client:
        return Client(nodes["llama"].address, None, opened_with(card, ports, **changes))

    return open_session


def tensors(answer: Answer) -> list[torch.Tensor]:
    """Every tensor of an answer."""
    assert not answer.code, answer.reply.failure
    ends = list(itertools.accumulate(header.size for header in answer.reply.tensors))
    return [
        unpack(header, answer.payload[end - header.size : end], 1 << 30)
        for header, end in zip(answer.reply.tensors, ends, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(connect: Connect) -> torch.Tensor:
    """What the server answers to a correct forward, whatever else it has been sent."""
    with connect(forward_only=False) as client:
        return client.ask(*request(1, [hidden(*ROWS)], rows=ROWS)).tensor.clone()


def assert_serves(connect: Connect, expected: torch.Tensor) -> None:
    with connect() as client:
        assert torch.equal(client.ask(*request(1, [hidden(*ROWS)], rows=ROWS)).tensor, expected)


def is_one_line(failure: pb.Failure) -> bool:
    return 0 < len(failure.message) < 200 and "\n" not in failure.message


BACKWARD, DECODE = pb.PASS_BACKWARD, pb.PASS_DECODE
REFUSED: dict[str, tuple[tuple[Port, ...], Make, str]] = {
    "a backward": ((), lambda: request(1, [hidden(8)], BACKWARD), "forbidden"),
    "a backward with its input": ((), lambda: request(1, [hidden(8), hidden(8)], BACKWARD, ROWS), "forbidden"),
    "a keep": ((), lambda: request(1, [hidden(8)], rows=ROWS, keep=True), "forbidden"),
    "a backward beside taps": (tuple(TAPS), lambda: request(1, [hidden(8)], BACKWARD), "forbidden"),
    "a keep beside taps": (tuple(TAPS), lambda: request(1, [hidden(8)], rows=ROWS, keep=True), "forbidden"),
    "a decode beside taps": (
        tuple(TAPS),
        lambda: request(1, [hidden(8)], DECODE, ROWS, sequence=pb.Sequence(id="s")),
        "forbidden",
    ),
    "a decode row by row": (
        (),
        lambda: request(1, [hidden(8)], DECODE, ROWS, sequence=pb.Sequence(id="s"), apart=True),
        "wire",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_beyond_forward_is_refused_by_name_and_the_session_goes_on(
    case: str, connect: Connect, expected: torch.Tensor
) -> None:
    ports, make, code = REFUSED[case]
    with connect(*ports) as client:
        answer = client.ask(*make())
        assert answer.code == code, answer.reply.failure
        assert is_one_line(answer.reply.failure)
        assert torch.equal(tensors(client.ask(*request(2, [hidden(*ROWS)], rows=ROWS)))[0], expected)
    assert_serves(connect, expected)


def test_a_backward_row_by_row_is_refused(connect: Connect, expected: torch.Tensor) -> None:
    with connect(forward_only=False) as client:
        assert client.ask(*request(1, [hidden(*ROWS)], rows=ROWS, keep=True)).reply.kept
        answer = client.ask(*request(1, [hidden(*ROWS)], BACKWARD, apart=True))
        assert answer.code == "wire"
        assert is_one_line(answer.reply.failure)
    assert_serves(connect, expected)


def test_a_decode_without_taps_is_answered(connect: Connect, expected: torch.Tensor) -> None:
    with connect() as client:
        answer = client.ask(*request(1, [hidden(*ROWS)], DECODE, ROWS, sequence=pb.Sequence(id="s")))
        assert torch.allclose(answer.tensor, expected, atol=1e-5)


BAD_PORTS: dict[str, tuple[list[Port | pb.Port], str]] = {
    "below the span": ([Port(0, 8)], "wire"),
    "above the span": ([Port(BLOCKS - 1, 8)], "wire"),
    "beyond the model": ([Port(2**32 - 1, 8)], "wire"),
    "of no width": ([Port(2, 0)], "wire"),
    "too wide": ([Port(2, HIDDEN + 1)], "wire"),
    "much too wide": ([Port(2, 2**32 - 1)], "wire"),
    "the same twice": ([Port(2, 8), Port(2, 8)], "wire"),
    "twice at a block": ([Port(2, 8), Port(2, 9)], "wire"),
    "out of order": ([Port(3, 8), Port(1, 8)], "wire"),
    "of an unknown kind": ([pb.Port(kind="adapter", block=2, width=8)], "wire"),
    "of no kind": ([pb.Port(block=2, width=8)], "wire"),
    "more than the blocks": ([Port(2, 8)] * (BLOCKS + 1), "wire"),
    "a hundred thousand": ([Port(2, 8)] * 100_000, "wire"),
}


def refusal(server: Server, request: pb.Open) -> pb.Failure:
    """The one frame that answers a bad opening."""
    with RawStream(server.address, None) as stream:
        stream.send(pb.ClientFrame(open=request))
        (frame,) = stream.finish()
        assert frame.HasField("failure"), frame
        return frame.failure


@pytest.mark.parametrize("case", BAD_PORTS)
def test_bad_ports_are_refused_in_one_line_and_others_are_served(
    case: str, nodes: dict[str, Server], card: pb.ModelCard, connect: Connect, expected: torch.Tensor
) -> None:
    ports, code = BAD_PORTS[case]
    failure = refusal(nodes["llama"], opened_with(card, ports))
    assert failure.code == code, failure
    assert is_one_line(failure)
    assert_serves(connect, expected)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"forward_only": False}, "usage"), ({"codec_port": "zstd"}, "usage"), ({"codec_port": ""}, "usage")],
)
def test_taps_are_refused_where_a_backward_exists_and_without_a_codec_that_is_known(
    nodes: dict[str, Server],
    card: pb.ModelCard,
    connect: Connect,
    expected: torch.Tensor,
    changes: dict[str, object],
    code: str,
) -> None:
    failure = refusal(nodes["llama"], opened_with(card, TAPS, **changes))
    assert failure.code == code, failure
    assert is_one_line(failure)
    assert_serves(connect, expected)


def test_a_session_opened_again_with_other_taps_is_refused(
    nodes: dict[str, Server], card: pb.ModelCard, connect: Connect
) -> None:
    first = opened_with(card, TAPS)
    with Client(nodes["llama"].address, None, first):
        again = opened_with(card, OTHER_TAPS)
        again.session = first.session
        assert refusal(nodes["llama"], again).code == "repeat"


def test_rows_that_are_answered_apart_are_those_that_are_answered_together(connect: Connect) -> None:
    with connect(*TAPS) as client:
        output, taps = tensors(client.ask(*request(1, [hidden(*ROWS)], rows=ROWS)))
        apart = tensors(client.ask(*request(2, [hidden(*ROWS)], rows=ROWS, apart=True)))
    assert [tuple(part.shape) for part in apart] == [(5, HIDDEN), (5, 8 + HIDDEN), (3, HIDDEN), (3, 8 + HIDDEN)]
    assert torch.equal(torch.cat(apart[::2]), output)
    assert torch.equal(torch.cat(apart[1::2]), taps)


def test_sessions_side_by_side_with_taps_other_taps_and_none_each_get_what_they_get_alone(connect: Connect) -> None:
    sessions: tuple[list[Port], ...] = ([], TAPS, OTHER_TAPS)
    inputs = [hidden(*ROWS, seed=seed) for seed in range(8)]

    def answers(client: Client) -> list[bytes]:
        return [
            bytes(client.ask(*request(number, [values], rows=ROWS)).payload)
            for number, values in enumerate(inputs, start=1)
        ]

    alone = []
    for ports in sessions:
        with connect(*ports) as client:
            alone.append(answers(client))
    widths = [0, 8 + HIDDEN, 5]
    for width, each in zip(widths, alone, strict=True):
        assert {len(answer) for answer in each} == {4 * sum(ROWS) * (HIDDEN + width)}
    with connect() as none, connect(*TAPS) as taps, connect(*OTHER_TAPS) as others, ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answers, (none, taps, others))) == alone


def test_a_tap_at_the_spans_last_block_is_its_output_projected(connect: Connect, expected: torch.Tensor) -> None:
    with connect(Port(BLOCKS - 2, 8)) as client:
        output, taps = tensors(client.ask(*request(1, [hidden(*ROWS)], rows=ROWS)))
    assert torch.equal(output, expected)
    assert torch.allclose(taps, output @ projection(HIDDEN, 8), atol=1e-5)
