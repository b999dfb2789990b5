"""Ports that no honest edge declares, and requests that do not fit them, are refused alone."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from isthmus.cut import Cut
from isthmus.errors import WireError, catalogue
from isthmus.ports import LORA, Port, check_ports
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from tests.bad_input.ports.conftest import Connect, assert_goes_on
from tests.bad_input.raw import RawStream, hidden, opening, request
from tests.bad_input.test_abuse import mutated, mutations
from tests.dlora.frames import (
    DOWN,
    INPUTS,
    ROWS,
    SITES,
    WIDTHS,
    Asked,
    Frames,
    answer,
    backward,
    forward,
    poisoned,
    port_opening,
    wire_ports,
)
from tests.harness import Server

EXAMPLES = 40
TAP = Port(2, 8)
MODULES = ("mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj")


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
