"""What a session with ports costs: bytes to the byte, questions by their number, operations as torch counts them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edge_client.edge_flops import count_edge_flops
from edge_client.port_adapters import PortWork
from edge_client.step import Stepper
from isthmus.ledger.record import Ledger
from isthmus.linears import Site
from isthmus.wire.gen import backbone_pb2 as pb
from tests.dlora.reference import (
    ALL,
    ATTENTION,
    CUTS,
    FAMILIES,
    SIZES,
    Asked,
    activate,
    gradients,
    overhear,
    span_numbers,
    with_ports,
)
from tests.harness import Server
from tests.parity.reference import HIDDEN, RANK, ragged_sequences, random_values
from tests.parity.test_flops import edge_formula
from tests.parity.test_training import LENGTHS, carried, in_microbatches

TOKENS = sum(LENGTHS) - len(LENGTHS)
"""A row's last token predicts nothing and is not run."""

WANTED = sum(sum(sequence.counted) for sequence in ragged_sequences(LENGTHS))
"""Positions whose logits are wanted."""

FRAME = 160
"""Bytes of headers and framing that a question, or its answer, may have beside its tensors."""


def groups_of(sites: Sequence[Site]) -> dict[tuple[int, str], list[str]]:
    """The modules of Llama that are asked together, by block and first of their group."""
    found: dict[tuple[int, str], list[str]] = {}
    for block in sorted({block for block, _ in sites}):
        for group in FAMILIES["llama"].groups:
            if members := [name for name in group if (block, name) in sites]:
                found[block, group[0]] = members
    return found


def due_bytes(cut: str, sites: Sequence[Site], codec: str = "none") -> dict[int, tuple[int, int]]:
    """Encoded bytes of a step in one microbatch at the ports of each block: to the cloud and to the edge.

    Forward an input comes once for its group and an addition goes for each module; backward the other way round, and
    nothing goes down from the lowest ports where nothing below the span trains.
    """
    found = dict.fromkeys((block for block, _ in sites), (0, 0))
    for at, ((block, first), members) in enumerate(groups_of(sites).items()):
        inputs, outputs = TOKENS * SIZES[first][0], [TOKENS * SIZES[name][1] for name in members]
        each = sum(carried(values, codec) for values in outputs)
        gradient = carried(inputs, codec) if at or cut != "0:0" else 0
        up, down = found[block]
        found[block] = (up + each + gradient, down + carried(inputs, codec) + each)
    return found


CHOICES: dict[str, Callable[[list[int]], list[Site]]] = {
    "q and v of every block": lambda span: [(n, f"self_attn.{m}_proj") for n in span for m in "qv"],
    "all of every block": lambda span: [(n, name) for n in span for name in SIZES],
    "a few": lambda span: [(span[1], "mlp.up_proj"), (span[1], "mlp.down_proj"), (span[3], "self_attn.k_proj")],
    "one": lambda span: [(span[2], "mlp.down_proj")],
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("cut", CUTS)
def test_the_bytes_of_a_step_are_exactly_what_its_active_ports_say(
    servers: dict[str, Server], cut: str, choice: str
) -> None:
    sites, ledger = CHOICES[choice](span_numbers("llama", cut)), Ledger()
    with with_ports(servers["llama"], cut, ALL, ledger) as (edge, tuning):
        wanted = activate(edge, tuning, sites)
        gradients(edge, tuning, ragged_sequences(LENGTHS), 1, wanted)
    due, below = due_bytes(cut, sites), 0 if cut == "0:0" else TOKENS
    returned = WANTED if cut == "0:0" else TOKENS  # where no block stands above, only outputs that the head needs
    boundary = 4 * HIDDEN * (TOKENS + returned), 4 * HIDDEN * (returned + below)
    at_ports = tuple(sum(way) for way in zip(*due.values(), strict=True))
    for way, boundary_bytes, port_bytes in zip(("up", "down"), boundary, at_ports, strict=True):
        assert ledger.total("train", f"{way}_payload_bytes") == boundary_bytes + port_bytes
    places, asked = ledger.places("train"), groups_of(sites)
    assert {place for place in places if "." not in place} == {str(block) for block in due}
    for block, ways in due.items():
        spent, trips = places[str(block)], 2 * sum(number == block for number, _ in asked)
        assert spent["round_trips"] == trips
        for way, tensors in zip(("up", "down"), ways, strict=True):
            assert 0 < spent[f"{way}_bytes"] - tensors < FRAME * trips
    assert ledger.total("train", "round_trips") == 2 + 2 * len(asked)  # forward and backward of the span itself


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_the_codec_of_ports_alone_decides_their_bytes(servers: dict[str, Server], codec: str) -> None:
    sites, ledger = CHOICES["all of every block"](span_numbers("llama", "1:1")), Ledger()
    with with_ports(servers["llama"], "1:1", ALL, ledger, codec_port=codec) as (edge, tuning):
        gradients(edge, tuning, ragged_sequences(LENGTHS), 1)
    for way, bytes_ in zip(("up", "down"), zip(*due_bytes("1:1", sites, codec).values(), strict=True), strict=True):
        assert ledger.total("train", f"{way}_payload_bytes") == sum(bytes_) + 2 * 4 * HIDDEN * TOKENS


def test_modules_that_share_an_input_are_asked_in_one_question(
    servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = overhear(monkeypatch)
    attention, gates = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    groups = [attention, ("self_attn.o_proj",), gates, ("mlp.down_proj",)]
    for targets, due in ((ATTENTION, [attention[::2]]), (ALL, groups)):
        heard.clear()
        with with_ports(servers["llama"], "1:1", targets) as (edge, tuning):
            tuning.load(random_values(tuning.trainable))
            gradients(edge, tuning, ragged_sequences(LENGTHS), 1)
        forward = [(block, group) for block in (1, 2, 3, 4) for group in due]
        assert [(asked.block, asked.modules) for asked in heard if not asked.backward] == forward
        assert [(asked.block, asked.modules) for asked in heard if asked.backward] == forward[::-1]
        for asked in heard:
            inputs = ((TOKENS, SIZES[asked.modules[0]][0]),)
            outputs = tuple((TOKENS, SIZES[name][1]) for name in asked.modules)
            assert (asked.came, asked.answered) == ((outputs, inputs) if asked.backward else (inputs, outputs))


@pytest.mark.parametrize("cut", CUTS)
def test_the_lowest_active_port_owes_no_gradient_where_nothing_below_trains(
    servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    heard = overhear(monkeypatch)
    with with_ports(servers["llama"], cut, ALL) as (edge, tuning):
        sites: list[Site] = [(2, "self_attn.o_proj"), (2, "mlp.up_proj"), (4, "self_attn.q_proj")]
        wanted = activate(edge, tuning, sites)
        gradients(edge, tuning, ragged_sequences(LENGTHS), 1, wanted)
    backward = {(asked.block, asked.modules[0]): asked for asked in heard if asked.backward}
    assert {site for site, asked in backward.items() if not asked.wanted} == (set(sites[:1]) if cut == "0:0" else set())
    assert all(bool(asked.answered) == asked.wanted for asked in backward.values())
    assert all(asked.wanted for asked in heard if not asked.backward)


def test_a_pass_that_no_training_follows_asks_for_no_backward(
    servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Asked] = overhear(monkeypatch)
    with with_ports(servers["llama"], "1:1", ATTENTION) as (_, tuning), torch.no_grad():
        tuning.model(torch.arange(3, 15)[None])
        tuning.model(torch.arange(3, 15)[None], use_cache=False)
    assert len(heard) == 2 * 4
    assert not any(asked.wanted or asked.backward for asked in heard)


@pytest.mark.parametrize("cut", CUTS)
def test_the_adapters_flops_are_what_torch_counts_in_both_passes_wanted_or_not(
    servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    counted = {False: 0, True: 0}
    answer = PortWork.answer

    def count(work: PortWork, ask: pb.PortCall, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        with FlopCounterMode(display=False) as counter:
            answered = answer(work, ask, tensors)
        counted[ask.backward] += counter.get_total_flops()
        return answered

    monkeypatch.setattr(PortWork, "answer", count)
    ledger = Ledger()
    with with_ports(servers["llama"], cut, ALL, ledger) as (edge, tuning):
        gradients(edge, tuning, ragged_sequences(LENGTHS), 1)
    places = {name: spent for name, spent in ledger.places("train").items() if "." in name}
    assert places.keys() == tuning.ports.keys()
    found = {way: sum(spent[f"edge_{way}_flops"] for spent in places.values()) for way in ("forward", "backward")}
    assert (found["forward"], found["backward"]) == (counted[False], counted[True])
    for name, spent in places.items():
        inputs, outputs = SIZES[name.partition(".")[2]]
        is_lowest = cut == "0:0" and name in ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj")
        into_input = 0 if is_lowest else inputs
        assert spent["edge_forward_flops"] == 2 * TOKENS * RANK * (inputs + outputs)
        assert spent["edge_backward_flops"] == 2 * TOKENS * RANK * (2 * outputs + inputs + into_input)


def test_the_edges_whole_compute_is_its_ends_and_the_adapters_at_ports(servers: dict[str, Server]) -> None:
    [batch] = in_microbatches(ragged_sequences(LENGTHS), 1)
    rows, width = batch.input_ids_BT.shape
    ledger = Ledger()
    with with_ports(servers["llama"], "1:1", ATTENTION, ledger) as (edge, tuning):
        stepper = Stepper(edge, tuning, ledger, count_edge_flops(edge, tuning), 1)
        stepper.gradients([batch])
        stepper.close()
    ends = edge_formula("llama", "1:1", rows, width, WANTED)
    for way, due in zip(("forward", "backward"), ends, strict=True):
        figure = f"edge_{way}_flops"
        at_ports = sum(spent.get(figure, 0) for spent in ledger.places("train").values())
        assert ledger.total("train", figure) == due + at_ports > due > 0


def test_where_all_blocks_are_the_clouds_the_edge_computes_the_head_in_both_passes(servers: dict[str, Server]) -> None:
    [batch] = in_microbatches(ragged_sequences(LENGTHS), 1)
    ledger = Ledger()
    with with_ports(servers["llama"], "0:0", ATTENTION, ledger) as (edge, tuning):
        stepper = Stepper(edge, tuning, ledger, count_edge_flops(edge, tuning), 1)
        stepper.gradients([batch])
        stepper.close()
        vocabulary = edge.model.get_output_embeddings().weight.shape[0]
    for way in ("forward", "backward"):
        at_ports = sum(spent.get(f"edge_{way}_flops", 0) for spent in ledger.places("train").values())
        assert ledger.total("train", f"edge_{way}_flops") == 2 * WANTED * HIDDEN * vocabulary + at_ports
