"""What crosses at ports: whoever does not answer, or asks what is wrong, costs itself alone."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from cloud_node import asks
from cloud_node.calls import Limits
from cloud_node.service import COMPUTE_THREADS, WAITING_THREADS
from edge_client.link import Link, Received
from edge_client.port_adapters import PortWork
from isthmus import PROTOCOL
from isthmus.errors import LimitError, WireError
from isthmus.ledger.record import Ledger
from isthmus.wire.frames import Chunk
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import Encoded, pack
from tests.bad_input.raw import describe, hidden, request
from tests.dlora.frames import (
    DOWN,
    ROWS,
    PortClient,
    adapting,
    answer,
    backward,
    forward,
    port_opening,
)
from tests.dlora.near import near
from tests.faults.training import Learner, same_bits, settings
from tests.harness import Server

WITHIN_S = 30.0
PATIENCE_S = 2.0


@pytest.fixture(scope="module")
def address(servers: dict[str, Server]) -> str:
    return servers["llama"].address


@pytest.fixture(scope="module")
def card(address: str) -> pb.ModelCard:
    return describe(address, None)


@pytest.fixture(scope="module")
def impatient(tiny_models: dict[str, Path], cache: Path) -> Iterator[str]:
    """A server that waits for an answer at a port for `PATIENCE_S` seconds."""
    with pytest.MonkeyPatch.context() as patch, near(tiny_models["llama"]) as server:
        patch.setattr(asks, "ANSWER_WITHIN_S", PATIENCE_S)
        yield server.address


def test_a_client_that_never_answers_loses_its_request_in_words_and_nothing_else(
    impatient: str, card: pb.ModelCard
) -> None:
    with PortClient(impatient, None, port_opening(card)) as client:
        asked = client.begin(*forward())
        began = time.monotonic()
        refused = client.reply()
        assert 0.5 * PATIENCE_S < time.monotonic() - began < 5 * PATIENCE_S
        assert refused.code == LimitError.code
        assert "no answer at a port of block 2" in refused.reply.failure.message
        client.stream.send(*answer(asked, asked.due))  # too late, which is nothing
        output, questions = client.through(*forward(2))
        assert not output.code
        assert len(questions) == 2


def test_a_request_that_was_given_up_may_come_again(impatient: str, card: pb.ModelCard) -> None:
    with PortClient(impatient, None, port_opening(card)) as client:
        first, _ = client.through(*forward())
        expected = first.tensor.clone()
        client.begin(*forward(2))
        assert client.reply().code == LimitError.code
        again, questions = client.through(*forward(2))
        assert torch.equal(again.tensor, expected)
        assert [asked.header.turn for asked in questions] == [1, 2]


def test_while_passes_wait_others_train_as_if_alone(
    address: str, card: pb.ModelCard, servers: dict[str, Server], rows: Path
) -> None:
    """More passes wait than the node has threads for those of others; each waits in mid-forward or mid-backward."""
    config = settings(servers["llama"], rows, method="dlora", targets=["q_proj", "down_proj"], microbatches=2)

    def trained() -> dict[str, torch.Tensor]:
        with adapting(config) as learner:
            for step in range(2):
                learner.step(step)
            return learner.values

    alone = trained()
    with ExitStack() as opened:
        for _ in range(COMPUTE_THREADS // WAITING_THREADS + 1):
            silent = opened.enter_context(PortClient(address, None, port_opening(card)))
            silent.through(*forward())
            silent.begin(*backward())
            for microbatch in range(2, WAITING_THREADS + 1):
                silent.begin(*forward(microbatch))
            opened.callback(silent.leave)
        assert same_bits(trained(), alone)
        assert silent.is_alive()


def test_the_device_is_not_held_while_a_pass_waits(address: str, card: pb.ModelCard) -> None:
    plain = {"ports": [], "codec_port": ""}
    with PortClient(address, None, port_opening(card)) as waits:
        asked = waits.begin(*forward())
        with PortClient(address, None, port_opening(card, **plain)) as other:
            done = other.ask(*request(1, [hidden(*ROWS)], rows=ROWS))
            assert done.tensor.shape == (sum(ROWS), 32)
            assert done.reply.cost.port_s == 0
        waited_s = 0.5
        time.sleep(waited_s)
        output, _ = waits.through(*answer(asked, asked.due))
        cost = output.reply.cost
        assert cost.port_s > waited_s
        assert cost.forward_s < cost.port_s
        assert cost.queue_s < cost.port_s


def test_passes_of_one_session_wait_and_are_answered_in_any_order(address: str, card: pb.ModelCard) -> None:
    with PortClient(address, None, port_opening(card)) as client:
        first, _ = client.through(*forward())
        expected = first.tensor.clone()
        waiting = [client.begin(*forward(microbatch)) for microbatch in (2, 3, 4)]
        for asked in reversed(waiting):
            output, _ = client.through(*answer(asked, asked.due))
            assert output.reply.key.microbatch == asked.header.key.microbatch
            assert torch.equal(output.tensor, expected)


def test_modules_that_share_an_input_ask_once_and_the_lowest_sends_nothing_further_down(
    address: str, card: pb.ModelCard
) -> None:
    with PortClient(address, None, port_opening(card)) as client:
        output, forwards = client.through(*forward(input_gradient=False))
        assert [(asked.header.block, len(asked.header.modules)) for asked in forwards] == [(2, 3), (3, 1)]
        assert [[tuple(part.shape) for part in asked.tensors] for asked in forwards] == [[(8, 32)], [(8, 64)]]
        gradient, backwards = client.through(*backward(input_gradient=False))
        assert [(asked.header.block, asked.header.wanted) for asked in backwards] == [(3, True), (2, False)]
        assert [tuple(part.shape) for part in backwards[1].tensors] == [(8, 32), (8, 16), (8, 16)]
        assert output.tensor.shape == (8, 32)
        assert gradient.tensor.shape == (0, 32)


def test_a_question_outlives_its_stream_and_is_asked_again_of_whoever_sends_the_request_again(
    address: str, card: pb.ModelCard
) -> None:
    with PortClient(address, None, port_opening(card)) as undisturbed:
        expected, _ = undisturbed.through(*forward())
    opening = port_opening(card)
    lost = PortClient(address, None, opening)
    before = lost.begin(*forward())
    lost.leave()
    with PortClient(address, None, opening) as client:
        after = client.begin(*forward())
        assert after.header == before.header
        assert after.payload == before.payload
        output, _ = client.through(*answer(after, after.due), *answer(after, after.due))
        assert torch.equal(output.tensor, expected.tensor)


def test_a_stream_carries_a_question_once_even_where_its_request_comes_late(address: str, card: pb.ModelCard) -> None:
    """Two copies at once would take turns, and their chunks could not be told apart."""
    opening = port_opening(card)
    lost = PortClient(address, None, opening)
    first = lost.begin(*forward())
    lost.leave()
    with PortClient(address, None, opening) as client:
        second = client.begin(*answer(first, first.due))  # the pass goes on, on the new stream
        assert second.header.turn == 2
        client.stream.send(*forward())
        output, questions = client.through(*answer(second, second.due))
        assert not questions
        assert not output.code


def test_a_stream_that_replaces_another_takes_over_its_questions(address: str, card: pb.ModelCard) -> None:
    opening = port_opening(card)
    old = PortClient(address, None, opening)
    before = old.begin(*forward())
    with PortClient(address, None, opening) as new:
        frame = old.stream.receive()
        assert frame is not None
        assert frame.failure.code == "draining"
        after = new.begin(*forward())
        assert after.header == before.header
        output, _ = new.through(*answer(after, after.due))
        assert not output.code
        old.leave()


def test_a_backward_whose_activations_are_gone_asks_in_its_forward_again(address: str, card: pb.ModelCard) -> None:
    with PortClient(address, None, port_opening(card)) as client:
        client.through(*forward())
        kept, asked = client.through(*backward())
        gradient = kept.tensor.clone()
        assert [question.header.backward for question in asked] == [True, True]
        assert client.ask(*backward()).code == "not-kept"
        inputs = [hidden(*ROWS, seed=9), hidden(*ROWS)]
        whole = request(1, inputs, pb.PASS_BACKWARD, ROWS, input_gradient=True)
        client.stream.send(*whole)
        turns = {}
        for question in itertools.islice(iter(client.question, None), 4):
            turns[question.header.turn] = question.header.backward
            # The forwards are answered as in the first request: their turns there were 1 and 2 as well. The backwards
            # were 1 and 2 in theirs, and are 3 and 4 here.
            question.header.turn -= 2 * question.header.backward
            due = question.due
            question.header.turn += 2 * question.header.backward
            client.stream.send(*answer(question, due))
        recomputed = client.reply()
        assert turns == {1: False, 2: False, 3: True, 4: True}
        assert torch.equal(recomputed.tensor, gradient)
        assert recomputed.reply.cost.recompute_flops > 0


# What a server may say to an edge, fed to a line that has sent one request.

KEY = pb.Key(microbatch=1, pass_kind=pb.PASS_FORWARD)
AT_PORT = pb.Key(microbatch=1, pass_kind=pb.PASS_FORWARD_PORT)


class Heard:
    """A stream that keeps what is put on it."""

    def __init__(self) -> None:
        self.sent: list[object] = []
        self.came = threading.Event()

    def put(self, message: Iterator[object], rank: int = 0) -> None:
        self.sent.append([outgoing.frame for outgoing in message])  # type: ignore[attr-defined]
        self.came.set()


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link("nowhere:1", None, pb.Open(protocol=PROTOCOL, session="s"), Ledger(), Limits().to_wire())
    link._keeper = threading.current_thread()  # as if a stream were being read
    yield link
    link._keeper = None
    link.close()


Answering = Callable[[pb.PortCall, list[torch.Tensor]], list[Encoded]]


def asked_on(link: Link, answering: Answering | None, microbatch: int = 1) -> "Future[Received]":
    header, payload = pack(torch.ones(2, 32), "none")
    key = pb.Key(microbatch=microbatch, pass_kind=pb.PASS_FORWARD)
    return link.request(pb.Call(key=key, tensors=[header]), [payload], "train", answer=answering)


def question(payload: torch.Tensor, key: pb.Key = AT_PORT, turn: int = 1) -> tuple[pb.ServerFrame, Chunk]:
    header, data = pack(payload, "none")
    ask = pb.PortCall(key=key, turn=turn, block=DOWN[0], modules=[DOWN[1]], tensors=[header])
    return pb.ServerFrame(port=ask), Chunk(key, 0, data)


def same_again(_: pb.PortCall, tensors: list[torch.Tensor]) -> list[Encoded]:
    return [pack(tensor, "none") for tensor in tensors]


def hear(link: Link, stream: Heard, *frames: pb.ServerFrame | Chunk) -> None:
    for frame in frames:
        link._handle(stream, frame)  # type: ignore[arg-type]


def assert_next_is_answered(link: Link, stream: Heard) -> None:
    later = asked_on(link, same_again, microbatch=2)
    key = pb.Key(microbatch=2, pass_kind=pb.PASS_FORWARD_PORT)
    hear(link, stream, *question(torch.ones(2, 64), key))
    assert stream.came.wait(WITHIN_S)
    hear(link, stream, pb.ServerFrame(reply=pb.Reply(key=pb.Key(microbatch=2, pass_kind=pb.PASS_FORWARD))))
    assert later.result(WITHIN_S).tensors == []


HEADER, CHUNK = question(torch.ones(2, 64))
FALSE_SUM = question(torch.ones(2, 64))[0]
FALSE_SUM.port.tensors[0].checksum = 1
VAST = question(torch.ones(2, 64))[0]
VAST.port.tensors[0].size = 1 << 60

UNHEARD_OF = {
    "a chunk before its question": (CHUNK,),
    "bytes twice": (question(torch.ones(2, 64))[0], Chunk(AT_PORT, 0, CHUNK.data[:8]), Chunk(AT_PORT, 0, CHUNK.data)),
    "a gap": (HEADER, Chunk(AT_PORT, 8, CHUNK.data[8:])),
    "a wrong checksum": (FALSE_SUM, CHUNK),
    "a size that cannot be": (VAST,),
    "a thousand tensors": (pb.ServerFrame(port=pb.PortCall(key=AT_PORT, tensors=[HEADER.port.tensors[0]] * 1000)),),
}


@pytest.mark.parametrize("frames", UNHEARD_OF.values(), ids=UNHEARD_OF)
def test_a_question_that_breaks_the_contract_ends_its_request_in_one_line(
    link: Link, frames: tuple[pb.ServerFrame | Chunk, ...]
) -> None:
    asked, stream = asked_on(link, same_again), Heard()
    hear(link, stream, *frames)
    with pytest.raises(WireError) as refused:
        asked.result(WITHIN_S)
    assert len(str(refused.value).splitlines()) == 1
    assert_next_is_answered(link, stream)


def test_a_server_that_asks_where_no_ports_are_ends_that_request(link: Link) -> None:
    asked, stream = asked_on(link, None), Heard()
    hear(link, stream, *question(torch.ones(2, 64)))
    with pytest.raises(WireError, match="asks at ports that were not opened"):
        asked.result(WITHIN_S)
    assert_next_is_answered(link, stream)


def test_what_an_answerer_raises_reaches_whoever_waits_for_the_request(link: Link) -> None:
    def fails(_: pb.PortCall, __: list[torch.Tensor]) -> list[Encoded]:
        raise ZeroDivisionError("as a mistake of ours would")

    asked, stream = asked_on(link, fails), Heard()
    hear(link, stream, *question(torch.ones(2, 64)))
    with pytest.raises(ZeroDivisionError):
        asked.result(WITHIN_S)
    assert_next_is_answered(link, stream)


def test_a_question_after_its_request_is_over_is_nothing(link: Link) -> None:
    asked, stream = asked_on(link, same_again), Heard()
    hear(link, stream, pb.ServerFrame(reply=pb.Reply(key=KEY)), *question(torch.ones(2, 64)))
    asked.result(WITHIN_S)
    assert not stream.sent
    assert_next_is_answered(link, stream)


# What a server may ask of adapters that are there.


@pytest.fixture(scope="module")
def learner(servers: dict[str, Server], rows: Path) -> Iterator[Learner]:
    with adapting(settings(servers["llama"], rows, method="dlora", targets=["q_proj", "k_proj"])) as learner:
        yield learner


@pytest.fixture
def work(learner: Learner) -> PortWork:
    """A request's work where all ports of block 2 and up take part."""
    adapters = learner.edge.adapters
    assert adapters is not None
    adapters.active = frozenset(site for site in adapters.sites if site[0] > 1)
    return adapters.begin("train")


def asking(*modules: str, block: int = 2, back: bool = False, wanted: bool = True) -> pb.PortCall:
    return pb.PortCall(key=AT_PORT, turn=1, block=block, modules=modules, backward=back, wanted=wanted)


INPUT = [torch.ones(3, 32)]
BOTH = [torch.ones(3, 32), torch.ones(3, 16)]
Q_PROJ, K_PROJ, V_PROJ = (f"self_attn.{name}_proj" for name in "qkv")

OUT_OF_PLACE = {
    "a port that was not opened": (asking(V_PROJ), INPUT),
    "a port that takes no part now": (asking(Q_PROJ, block=1), INPUT),
    "a port of the edge's own blocks": (asking(Q_PROJ, block=0), INPUT),
    "no port": (asking(), INPUT),
    "a port twice": (asking(Q_PROJ, Q_PROJ), INPUT),
    "a block of a thousand modules": (asking(*[Q_PROJ] * 1000), INPUT),
    "another width": (asking(Q_PROJ, K_PROJ), [torch.ones(3, 31)]),
    "no tensor": (asking(Q_PROJ, K_PROJ), []),
    "two inputs": (asking(Q_PROJ, K_PROJ), INPUT * 2),
    "a vector": (asking(Q_PROJ, K_PROJ), [torch.ones(32)]),
    "a backward of what was not asked forward": (asking(Q_PROJ, back=True), INPUT),
}


@pytest.mark.parametrize(("ask", "tensors"), OUT_OF_PLACE.values(), ids=OUT_OF_PLACE)
def test_an_edge_answers_only_what_fits_its_ports(
    work: PortWork, ask: pb.PortCall, tensors: list[torch.Tensor]
) -> None:
    with pytest.raises(WireError) as refused:
        work.answer(ask, tensors)
    assert len(str(refused.value).splitlines()) == 1
    assert len(work.answer(asking(Q_PROJ, K_PROJ), INPUT)) == 2


OTHERWISE = {
    "fewer modules": (asking(Q_PROJ, back=True), BOTH[:1]),
    "the modules in another order": (asking(K_PROJ, Q_PROJ, back=True), BOTH[::-1]),
    "fewer tokens": (asking(Q_PROJ, K_PROJ, back=True), [part[1:] for part in BOTH]),
    "fewer gradients": (asking(Q_PROJ, K_PROJ, back=True), BOTH[:1]),
    "the gradients in another order": (asking(Q_PROJ, K_PROJ, back=True), BOTH[::-1]),
    "another block": (asking(Q_PROJ, K_PROJ, block=3, back=True), BOTH),
}


@pytest.mark.parametrize(("ask", "tensors"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_backward_asks_as_its_forward_did_or_is_refused(
    work: PortWork, ask: pb.PortCall, tensors: list[torch.Tensor]
) -> None:
    work.answer(asking(Q_PROJ, K_PROJ), INPUT)
    with pytest.raises(WireError, match="otherwise than its forward"):
        work.answer(ask, tensors)
    (below,) = work.answer(asking(Q_PROJ, K_PROJ, back=True), BOTH)
    assert below.shape == (3, 32)


def test_a_backward_of_a_forward_that_announced_none_is_refused(work: PortWork) -> None:
    work.answer(asking(Q_PROJ, K_PROJ, wanted=False), INPUT)
    with pytest.raises(WireError, match="otherwise than its forward"):
        work.answer(asking(Q_PROJ, K_PROJ, back=True), BOTH)


def test_a_backward_that_leaves_a_port_out_gives_no_gradients(work: PortWork) -> None:
    work.answer(asking(Q_PROJ, K_PROJ), INPUT)
    work.answer(asking(Q_PROJ, K_PROJ, back=True), BOTH)
    with pytest.raises(WireError, match="left a port out"):
        work.gradients()


def test_questions_that_come_twice_have_the_same_answers_and_gradients(work: PortWork) -> None:
    def ask() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        found = []
        for block in (2, 3, 4):
            found += work.answer(asking(Q_PROJ, K_PROJ, block=block), INPUT)
            found += work.answer(asking(Q_PROJ, K_PROJ, block=block, back=True), BOTH)
        return found, work.gradients()

    once, again = ask(), ask()
    for one, other in zip(once, again, strict=True):
        assert all(torch.equal(this, that) for this, that in zip(one, other, strict=True))
