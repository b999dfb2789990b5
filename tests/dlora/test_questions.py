"""An edge answers no question but one that fits its request and its ports; any other ends that request, in one line."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from cloud_node.calls import Limits
from edge_client.link import Link, Received
from edge_client.port_adapters import PortWork
from isthmus import PROTOCOL
from isthmus.errors import WireError
from isthmus.ledger.record import Ledger
from isthmus.wire.frames import Chunk
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import Encoded, pack
from tests.dlora.frames import DOWN, adapting
from tests.faults.training import Learner, settings
from tests.harness import Server

WITHIN_S = 30.0

# What a server may say to an edge, fed to a line that has sent one request.

KEY = pb.Key(microbatch=1, pass_kind=pb.PASS_FORWARD)
AT_PORT = pb.Key(microbatch=1, pass_kind=pb.PASS_FORWARD_PORT)


class Heard:
    """A stream that keeps what is put on it."""

    def __init__(self) -> None:
        self.sent: list[object] = []
        self.latest_bytes = 1
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
