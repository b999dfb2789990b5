"""What the cloud computes backwards ends at the lowest ports of a pass, wherever in a block they are."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cloud_node.engine import Asked, Opening
from cloud_node.factors import Factors
from cloud_node.opened import OpenSession
from cloud_node.span import Span
from isthmus.cut import Cut
from isthmus.errors import LimitError
from isthmus.ledger.lowest import LowestBlock
from isthmus.load import load_span
from isthmus.ports import CORE, Port
from isthmus.round_trips import Parked, RoundTrips, asking
from isthmus.rows import Rows

D, T = 32, 21
NUMBERS = range(4)
CUT = Cut(0, 2)
CHOICES = {
    "queries": ("self_attn.q_proj",),
    "values": ("self_attn.v_proj",),
    "behind attention": ("self_attn.o_proj",),
    "in the middle": ("mlp.gate_proj", "mlp.down_proj"),
    "all": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"),
}


class Echo:
    """An edge whose answers are zeros."""

    def ask(self, question: object) -> list[torch.Tensor]:
        tokens = len(question.tensors[0])  # type: ignore[attr-defined]
        return [torch.zeros(tokens, width) for width in question.widths]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def span(tiny_models: dict[str, Path]) -> Span:
    model, found = load_span(tiny_models["llama"], CUT, torch.float32)
    return Span(model, found, CUT)


def counted_for_real(span: Span, block: int, modules: tuple[str, ...], parked: dict[str, Parked]) -> int:
    """A backward of one row through the span on real tensors, with ports in one block and parked adapters there."""
    span._base.set_attn_implementation("eager")  # the counter takes fused attention on a CPU for nothing
    active = [(block, name) for name in modules]
    held = {(block, name): adapter for name, adapter in parked.items()}
    trips = RoundTrips(active, held, span.linears, Echo(), None, graph=True)
    with asking(trips):
        output_ND = span.forward(torch.randn(T, D), Rows((T,), (0,)))
    with FlopCounterMode(display=False) as counter:
        output_ND.backward(torch.ones_like(output_ND))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("block", NUMBERS)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_backward_costs_the_blocks_above_and_its_part_of_the_lowest(span: Span, choice: str, block: int) -> None:
    above = span.flops.backward.of(1, T) * (NUMBERS[-1] - block) // len(NUMBERS)
    within = span.lowest.backward(CHOICES[choice], {})
    assert above + within.of(1, T) == counted_for_real(span, block, CHOICES[choice], {})


def test_what_is_parked_above_a_port_has_a_gradient_too_and_beside_it_has_none(span: Span) -> None:
    lowest: LowestBlock = span.lowest
    above = {"mlp.down_proj": Parked(torch.zeros(4, 2 * D), torch.zeros(D, 4))}
    plain = lowest.backward(("self_attn.v_proj",), {})
    assert lowest.backward(("self_attn.v_proj",), {"self_attn.q_proj": 4}) == plain
    grown = lowest.backward(("self_attn.v_proj",), {"mlp.down_proj": 4}).of(1, T) - plain.of(1, T)
    assert grown == 2 * T * 4 * (2 * D + D)
    assert plain.of(1, T) + grown == counted_for_real(span, NUMBERS[-1], ("self_attn.v_proj",), above)


@pytest.mark.parametrize("block", NUMBERS)
@pytest.mark.parametrize("choice", CHOICES)
def test_cores_cost_what_their_factors_do_in_both_passes(span: Span, choice: str, block: int) -> None:
    rank, modules = 5, CHOICES[choice]
    ports = tuple(Port(block, module=name, kind=CORE, rank=rank, init="svd") for name in sorted(modules))
    opened = OpenSession("cores", span, Opening(CUT, ports), frozen=Factors(1 << 24).of(span, ports))
    rows, sites = Rows((T,), (0,)), frozenset((port.block, port.module) for port in ports)
    span._base.set_attn_implementation("eager")
    for below in (True, False):
        asked = Asked(sites, Echo(), input_gradient=below)
        trips = RoundTrips(sites, {}, span.linears, Echo(), None, graph=True, frozen=opened.frozen)
        with asking(trips), FlopCounterMode(display=False) as forward:
            output_ND = span.forward(torch.randn(T, D, requires_grad=below), rows)
        with FlopCounterMode(display=False) as backward:
            output_ND.backward(torch.ones_like(output_ND))
        around = 2 * T * rank * sum(span.linears[site].inputs + span.linears[site].outputs for site in sites)
        assert opened.beside_flops(rows, asked) == around
        assert span.flops.forward.of(1, T) + around == forward.get_total_flops()
        assert opened.backward_flops(rows, asked) == backward.get_total_flops()


def test_factors_are_held_once_within_their_limit_and_go_when_no_session_uses_them(span: Span) -> None:
    def port(seed: int) -> list[Port]:
        return [Port(0, module="mlp.down_proj", kind=CORE, rank=4, init="random", seed=seed)]

    size = 4 * 4 * (2 * D + D)
    factors = Factors(2 * size)
    first, again, second = factors.of(span, port(1)), factors.of(span, port(1)), factors.of(span, port(2))
    site = (0, "mlp.down_proj")
    assert first[site] is again[site]
    assert first[site] is not second[site]
    assert factors.nbytes == 2 * size
    with pytest.raises(LimitError, match="lower --rank"):
        factors.of(span, port(3))
    del second
    third = factors.of(span, port(3))
    assert factors.nbytes == 2 * size
    assert third[site].nbytes == size
