"""Ports that no honest edge declares, answers that none gives: each costs its own request, and nobody else anything."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from cloud_node.asks import IGNORED
from isthmus.cut import Cut
from isthmus.errors import WireError, catalogue
from isthmus.ports import LORA, Port, check_ports
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack
from tests.bad_input.raw import RawStream, describe, hidden, identity, opening, request
from tests.bad_input.test_abuse import mutated, mutations
from tests.dlora.frames import (
    DOWN,
    INPUTS,
    ROWS,
    SITES,
    WIDTHS,
    Asked,
    Frames,
    PortClient,
    answer,
    backward,
    chunks,
    forward,
    poisoned,
    port_opening,
    wire_ports,
)
from tests.faults.training import wait_until
from tests.harness import Server

EXAMPLES = 40
TAP = Port(2, 8)
MODULES = ("mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj")

Connect = Callable[..., PortClient]


@pytest.fixture(scope="module")
def credentials(owner: Path) -> Credentials:
    return identity(owner, "alice")


@pytest.fixture(scope="module")
def card(guarded: Server, credentials: Credentials) -> pb.ModelCard:
    return describe(guarded.address, credentials)


@pytest.fixture(scope="module")
def connect(guarded: Server, credentials: Credentials, card: pb.ModelCard) -> Connect:
    """Open a session of a name of its own, at `SITES`."""
    return lambda **changes: PortClient(guarded.address, credentials, port_opening(card, **changes))


def step(client: PortClient, microbatch: int = 1 << 40) -> tuple[torch.Tensor, torch.Tensor]:
    """What a forward and its backward answer where every question is answered as is due."""
    output, asked = client.through(*forward(microbatch))
    gradient, asked_back = client.through(*backward(microbatch))
    assert [len(asked), len(asked_back)] == [2, 2]
    return output.tensor.clone(), gradient.tensor.clone()


@pytest.fixture(scope="module")
def expected(connect: Connect) -> tuple[torch.Tensor, torch.Tensor]:
    with connect() as client:
        return step(client)


def assert_goes_on(client: PortClient, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(step(client), expected, strict=True))


@pytest.fixture(autouse=True)
def others_go_on(connect: Connect, expected: tuple[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """A session beside whatever a test does gets the same numbers during it and afterwards."""
    with connect() as beside:
        yield
        assert_goes_on(beside, expected)


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


def lora(block: int, module: str, width: int = 0) -> pb.Port:
    return Port(block, width, module, LORA).to_wire()


TAPS = {"forward_only": True}
ALL = sorted((block, module) for block in range(1, 5) for module in MODULES)

NOT_OPENED: dict[str, tuple[dict[str, object], str]] = {
    "no such module": ({"ports": [lora(2, "self_attn.x_proj")]}, "wire"),
    "a module that is not linear": ({"ports": [lora(2, "self_attn")]}, "wire"),
    "a whole block": ({"ports": [lora(2, "")]}, "wire"),
    "a module's long name": ({"ports": [lora(2, "x" * 100_000)]}, "wire"),
    "a block below the span": ({"ports": [lora(0, DOWN[1])]}, "wire"),
    "a block above the span": ({"ports": [lora(5, DOWN[1])]}, "wire"),
    "a block of no model": ({"ports": [lora(2**32 - 1, DOWN[1])]}, "wire"),
    "a port twice": ({"ports": [lora(*DOWN), lora(*DOWN)]}, "wire"),
    "ports out of order": ({"ports": wire_ports(SITES[::-1])}, "wire"),
    "a tap among lora ports": ({"ports": [TAP.to_wire(), lora(*DOWN)], **TAPS}, "wire"),
    "more ports than there are places": ({"ports": wire_ports(ALL * 4)}, "wire"),
    "a lora port with a width": ({"ports": [lora(*DOWN, width=8)]}, "wire"),
    "a tap of a module": ({"ports": [Port(3, 8, DOWN[1]).to_wire()], **TAPS}, "wire"),
    "an unknown kind": ({"ports": [pb.Port(kind="core", block=3, module=DOWN[1])]}, "wire"),
    "no codec for ports": ({"codec_port": ""}, "usage"),
    "an unknown codec for ports": ({"codec_port": "zstd"}, "usage"),
    "a codec for ports without any": ({"ports": [], "codec_port": "none"}, "usage"),
}


@pytest.mark.parametrize(("changes", "code"), NOT_OPENED.values(), ids=NOT_OPENED)
def test_a_session_with_ports_that_cannot_be_is_refused_in_one_line(
    guarded: Server, credentials: Credentials, card: pb.ModelCard, changes: dict[str, object], code: str
) -> None:
    with RawStream(guarded.address, credentials) as stream:
        stream.send(pb.ClientFrame(open=port_opening(card, **changes)))
        (frame,) = stream.rest()
    assert frame.failure.code == code
    assert len(frame.failure.message.splitlines()) == 1
    assert len(frame.failure.message) < 300


def test_a_session_does_not_change_its_ports(
    guarded: Server, credentials: Credentials, card: pb.ModelCard, connect: Connect
) -> None:
    with connect(name="of-one-mind"), RawStream(guarded.address, credentials) as stream:
        stream.send(pb.ClientFrame(open=port_opening(card, "of-one-mind", ports=wire_ports([DOWN]))))
        assert [frame.failure.code for frame in stream.rest()] == ["repeat"]


PLACES = [(block, module) for block in range(6) for module in (*MODULES, "self_attn", "")]
PORT = st.builds(lambda place, width: Port(place[0], width, place[1], LORA), st.sampled_from(PLACES), st.integers(0, 1))


@seeded(4)
@settings(max_examples=300, deadline=None, database=None)
@given(ports=st.lists(PORT, max_size=4) | st.sets(PORT, max_size=4).map(sorted))
def test_what_passes_is_ports_at_linear_modules_of_the_span_in_their_order(ports: list[Port]) -> None:
    linears = {(block, module) for block in range(6) for module in MODULES}
    sites = [(port.block, port.module) for port in ports]
    good = all(site in linears and 1 <= site[0] <= 4 for site in sites) and not any(port.width for port in ports)
    if good and all(one < other for one, other in itertools.pairwise(sites)):
        check_ports(ports, Cut(1, 1), 6, 32, linears)
    else:
        with pytest.raises(WireError):
            check_ports(ports, Cut(1, 1), 6, 32, linears)


def park(microbatch: int, pairs: list[torch.Tensor], ports: bytes = b"") -> Frames:
    """Frozen adapters left with the cloud: down and up for each port that `ports` names."""
    return request(microbatch, pairs, pb.PASS_PARK, ports=ports)


def parked_at(*sites: tuple[int, str], rank: int = 2) -> list[torch.Tensor]:
    """Adapters that fit."""
    pairs = [(torch.ones(rank, INPUTS[site]), 0.01 * torch.ones(WIDTHS[site], rank)) for site in sites]
    return [matrix for pair in pairs for matrix in pair]


def of(matrix: int, value: torch.Tensor) -> list[torch.Tensor]:
    """An adapter of `DOWN` with one matrix exchanged."""
    pair = parked_at(DOWN)
    pair[matrix] = value
    return pair


LAST = bytes([1 << SITES.index(DOWN)])

REFUSED: dict[str, tuple[Frames, str]] = {
    "a bitmap of too many bytes": (forward(ports=b"\x0f\x00"), "wire"),
    "a bitmap with bits beyond the ports": (forward(ports=b"\x1f"), "wire"),
    "a bitmap of too many bytes in a backward": (backward(ports=b"\x0f\x00"), "wire"),
    "rows apart": (forward(apart=True, keep=False), "wire"),
    "what was never parked": (forward(parked=77), "not-kept"),
    "one matrix": (park(9, parked_at(DOWN)[:1], LAST), "wire"),
    "three matrices": (park(9, parked_at(DOWN, DOWN)[:3], LAST), "wire"),
    "adapters of more ports than are named": (park(9, parked_at(DOWN, DOWN), LAST), "wire"),
    "adapters of fewer ports than are named": (park(9, parked_at(DOWN)), "wire"),
    "adapters of more ports than there are": (park(9, parked_at(*SITES, DOWN)), "wire"),
    "adapters at no such port": (park(9, parked_at(DOWN), b"\x10"), "wire"),
    "no adapters": (park(9, []), "wire"),
    "a down for other inputs": (park(9, of(0, torch.ones(2, 32)), LAST), "wire"),
    "an up for other outputs": (park(9, of(1, torch.ones(64, 2)), LAST), "wire"),
    "ranks that differ": (park(9, of(1, torch.ones(32, 3)), LAST), "wire"),
    "rank 0": (park(9, parked_at(DOWN, rank=0), LAST), "wire"),
    "a vector": (park(9, of(0, torch.ones(64)), LAST), "wire"),
    "a stack of matrices": (park(9, of(0, torch.ones(1, 2, 64)), LAST), "wire"),
    "integers": (park(9, [part.long() for part in parked_at(DOWN)], LAST), "wire"),
    "NaN": (poisoned(park(9, parked_at(DOWN), LAST), float("nan")), "wire"),
}


@pytest.mark.parametrize(("frames", "code"), REFUSED.values(), ids=REFUSED)
def test_a_request_that_does_not_fit_the_ports_is_refused_alone(
    connect: Connect, expected: tuple[torch.Tensor, torch.Tensor], frames: Frames, code: str
) -> None:
    with connect() as client:
        assert client.ask(*frames).code == code
        assert_goes_on(client, expected)


def test_what_is_parked_is_added_and_a_bad_one_after_it_changes_nothing(connect: Connect) -> None:
    with connect() as client:
        plain = client.ask(*forward(1, ports=b"\x00")).tensor.clone()
        assert not client.ask(*park(2, parked_at(DOWN), LAST)).code
        added = client.ask(*forward(3, ports=b"\x00", parked=2)).tensor.clone()
        assert not torch.equal(added, plain)
        assert client.ask(*poisoned(park(4, parked_at(DOWN), LAST), float("inf"))).code == "wire"
        assert torch.equal(client.ask(*forward(5, ports=b"\x00", parked=2)).tensor, added)
        assert client.ask(*forward(6, ports=b"\x00", parked=4)).code == "not-kept"
        assert torch.equal(client.ask(*forward(7, ports=b"\x00")).tensor, plain)


def test_what_one_session_parked_is_not_anothers(connect: Connect) -> None:
    with connect() as one, connect() as other:
        assert not one.ask(*park(2, parked_at(DOWN), LAST)).code
        assert other.ask(*forward(3, ports=b"\x00", parked=2)).code == "not-kept"


@pytest.mark.parametrize("taps", [False, True], ids=["no ports", "taps"])
def test_a_session_without_lora_ports_is_refused_what_goes_with_them(connect: Connect, taps: bool) -> None:
    tapped = {"ports": [TAP.to_wire()], "codec_port": "none", **TAPS}
    with connect(**(tapped if taps else {"ports": [], "codec_port": ""})) as client:
        for microbatch, given in enumerate(({"ports": b"\x01"}, {"parked": 5}), 1):
            frames = request(microbatch, [hidden(*ROWS)], rows=ROWS, **given)
            assert client.ask(*frames).code == "forbidden"
        assert client.ask(*park(5, parked_at(DOWN), LAST)).code == "forbidden"
        assert not client.ask(*request(6, [hidden(*ROWS)], rows=ROWS)).code


def conversation(card: pb.ModelCard, session: str) -> list[bytes]:
    """A session with ports; its answers are sent without waiting for the questions."""
    with_ports = [
        pb.ClientFrame(open=opening(card, session, ports=wire_ports([DOWN]), codec_port="none")),
        *park(1, parked_at(DOWN), b"\x01"),
        *forward(2, ports=b"\x00", parked=1),
        *forward(3),
    ]
    header = pb.PortCall(key=pb.Key(microbatch=3, pass_kind=pb.PASS_FORWARD_PORT), turn=1)
    due = answer(Asked(header), [torch.zeros(sum(ROWS), WIDTHS[DOWN])])
    return [frame.SerializeToString() for frame in [*with_ports, *due, *due]]


def test_mutated_sessions_with_ports_get_typed_answers_or_a_clean_end(
    guarded: Server, credentials: Credentials, card: pb.ModelCard
) -> None:
    known = set(catalogue()) - {"internal"}

    @seeded(21)
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @given(changes=mutations(), session=st.integers(0, 7))
    def attack(changes: list[tuple[str, int, int, int]], session: int) -> None:
        with RawStream(guarded.address, credentials) as stream:
            stream.send(*mutated(conversation(card, f"port-fuzz-{session}"), changes))
            for frame in stream.finish():
                failure = frame.failure if frame.HasField("failure") else frame.reply.failure
                assert not failure.code or failure.code in known, failure
                assert frame.WhichOneof("body") is not None

    attack()


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
