"""Seconds of a step follow from bytes, round trips and FLOPs: by hand where all is known, and on a real slow line."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from isthmus.cut import Cut
from isthmus.planning.figures import Crossing, Leg, SideFlops, Step
from isthmus.planning.legs import Asked, legs_of
from isthmus.planning.links import MBIT, Link
from isthmus.planning.machines import Machine, PassSpeed, Speed
from isthmus.planning.overlap import Stage, together
from isthmus.planning.passes import passes_of
from isthmus.planning.questions import PortQuestion
from isthmus.planning.seconds import Handling, Passes, step_seconds
from tests.harness import Server, run_command, tiny_config

LINK = Link(round_trip_s=0.1, up=1000.0, down=2000.0)
FREE = Handling(request_s=0.0, byte_s=0.0)


def machine(flops: float, head_flops: float | None = None, **fixed: float) -> Machine:
    """A device whose backward is half as fast as its forward."""
    head = head_flops or flops
    fixed_s = {"block_s": 0.0, "call_s": 0.0, **fixed}
    forward = PassSpeed(flops=flops, head_flops=head, **fixed_s)
    backward = PassSpeed(flops=flops / 2, head_flops=head / 2, **fixed_s)
    return Machine(
        "made up", Speed(forward=forward, backward=backward, update_s=0.5, tensor_s=0.02, value_s=0.001), None, "a test"
    )


STEP = Step(Crossing(500.0, 400.0, 2.0), SideFlops(30.0, 60.0), SideFlops(100.0, 100.0))
EDGE, CLOUD = machine(10.0), machine(100.0)


def test_one_microbatch_takes_the_sum_of_everything() -> None:
    found = step_seconds(STEP, LINK, EDGE, CLOUD, 1, handling=FREE)
    assert found.edge == pytest.approx(3 + 12 + 0.5)
    assert found.cloud == pytest.approx(1 + 2)
    assert found.wire == pytest.approx(0.5 + 0.2)
    assert found.latency == pytest.approx(0.2)
    assert (found.handling, found.hidden) == (0, 0)
    assert found.total == pytest.approx(15.5 + 3 + 0.7 + 0.2)


def test_blocks_calls_messages_values_and_the_output_layer_cost_what_was_measured_of_each() -> None:
    edge, cloud = machine(10.0, 5.0, block_s=0.1, call_s=0.01), machine(100.0, block_s=0.2)
    passes = Passes(1, 4, 3, 1, 1, 6, 6, head=SideFlops(10.0, 10.0), trained=7, tensors=3)
    found = step_seconds(STEP, LINK, edge, cloud, 1, passes, Handling(request_s=0.03, byte_s=0.0001))
    forward, backward = 2 + 2 + 0.4 + 0.01, 50 / 5 + 10 / 2.5 + 0.3 + 0.01
    assert found.edge == pytest.approx(forward + backward + 0.5 + 3 * 0.02 + 0.007)
    assert found.cloud == pytest.approx(3 + 2 * 1.2)
    assert found.handling == pytest.approx(2 * 0.03 + 900 * 0.0001)
    assert found.hidden == 0


def test_every_microbatch_has_its_own_fixed_costs() -> None:
    edge, passes = machine(10.0, block_s=0.1, call_s=0.01), Passes(1, 4, 4)
    one, two = (step_seconds(STEP, LINK, edge, CLOUD, count, passes, FREE) for count in (1, 2))
    assert two.edge - one.edge == pytest.approx(2 * (4 * 0.1 + 0.01))


def test_what_computes_nothing_takes_no_time_there() -> None:
    alone = Step(edge=SideFlops(30.0, 60.0))
    found = step_seconds(alone, LINK, EDGE, machine(1.0, block_s=9.0), 1, Passes(cloud_blocks=6), FREE)
    assert (found.cloud, found.wire, found.latency) == (0, 0, 0)
    assert found.total == pytest.approx(15.5)


def test_two_microbatches_hide_one_another_where_they_can() -> None:
    """Each: 1 s here, 3 s on the way up, 1 s there. The second's bytes wait for the first's: 1 + 3 + 3 + 1."""
    assert together((Stage("edge", 1), Stage("up", 3), Stage("cloud", 1)), 2) == pytest.approx(8)
    assert together((Stage("edge", 1), Stage("way", 3), Stage("cloud", 1)), 2) == pytest.approx(1 + 1 + 3 + 1)


def test_who_begins_computes_before_who_goes_on() -> None:
    """The first's answer is there after 2 s; the third begins then, and the first goes on after that."""
    stages = (Stage("edge", 1), Stage("way", 1), Stage("edge", 1))
    assert together(stages, 3) == pytest.approx(6)
    assert together((*stages, Stage("way", 5)), 3) == pytest.approx(6 + 5)


def test_both_directions_carry_at_once_and_one_computes_at_a_time() -> None:
    assert together((Stage("up", 2), Stage("down", 2)), 3) == pytest.approx(2 + 2 + 2 + 2)
    assert together((Stage("edge", 2),), 3) == pytest.approx(6)
    assert together((), 4) == 0


def test_directions_that_are_loaded_one_after_the_other_hide_less() -> None:
    """All microbatches send most in their forwards and receive most in their backwards: each lane idles by turns."""
    fast, step = machine(1e4), Step(Crossing(4000.0, 8000.0, 40.0), STEP.edge, STEP.cloud)

    def legs(up: float) -> tuple[Leg, ...]:
        return (*[Leg(up, 1 - up, 1)] * 5, *[Leg(1 - up, up, 1, backward=True)] * 5)

    found = [step_seconds(step, LINK, fast, fast, 4, Passes(legs=legs(up)), FREE) for up in (0.5, 0.7, 0.9)]
    assert found[0].total < found[1].total < found[2].total
    assert found[0].wire == found[2].wire


def test_a_span_that_asks_early_and_then_computes_hides_less_than_one_that_asks_evenly() -> None:
    """Two microbatches of 10 s on the cloud: where the last leg has nearly all of them, it is waited for alone."""
    slow = Step(Crossing(0.0, 0.0, 4.0), cloud=SideFlops(2000.0))
    fast, link = machine(1e6), replace(LINK, round_trip_s=5.0)
    even, late = (
        step_seconds(slow, link, fast, CLOUD, 2, Passes(legs=(Leg(1, 1, first), Leg(1, 1, 10 - first))), FREE)
        for first in (5, 0)
    )
    # Evenly: 2.5 on the way, twice 5 of each in turn, and the way again, all hidden but the first's and the last's.
    assert even.total == pytest.approx(2.5 + 4 * 5 + 2.5 + 0.5, abs=0.01)
    assert late.total == pytest.approx(2.5 + 5 + 2 * 10 + 2.5 + 0.5, abs=0.01)


def test_a_question_at_a_port_takes_the_edge_as_long_as_a_block_with_few_tokens() -> None:
    asked, edge = (Leg(1, 1, 2), Leg(1, 1, 2), Leg(2, 2, 4, backward=True)), machine(10.0, block_s=0.1)
    step = replace(STEP, crossing=Crossing(500.0, 400.0, 3.0))
    plain, ported = (step_seconds(step, LINK, edge, CLOUD, 1, Passes(legs=legs)) for legs in ((), asked))
    assert ported.edge - plain.edge == pytest.approx(0.1)


def test_the_legs_of_a_pass_lie_between_the_blocks_that_ask() -> None:
    """A span of blocks 2 to 7, asking at 3 and 6: what a port takes down and gives up, it gives back."""

    def asked(block: int, backward: bool) -> Asked:
        crossing = Crossing(*((30.0, 10.0) if backward else (10.0, 30.0)), 1.0)
        return Asked(PortQuestion(block, ("q",), backward, True, (3,), (1,)), crossing)

    questions = [asked(block, backward) for block in (6, 3) for backward in (True, False)]
    forward, backward = Crossing(100.0, 50.0, 1.0), Crossing(50.0, 100.0, 1.0)
    assert legs_of(range(2, 8), forward, backward, questions) == (
        Leg(100, 30, 1),
        Leg(10, 30, 3),
        Leg(10, 50, 2),
        Leg(50, 10, 2, backward=True),
        Leg(30, 10, 3, backward=True),
        Leg(30, 100, 1, backward=True),
    )
    assert legs_of(range(2, 8), forward, None) == (Leg(100, 50, 6),)


def test_microbatches_that_nothing_crosses_for_hide_nothing() -> None:
    found = step_seconds(Step(edge=STEP.edge), LINK, EDGE, CLOUD, 4, handling=FREE)
    assert (found.total, found.hidden) == (pytest.approx(15.5), pytest.approx(0))


@pytest.mark.parametrize("microbatches", [2, 3, 8])
@pytest.mark.parametrize("trips", [2.0, 18.0])
def test_what_is_hidden_is_never_more_than_can_be(microbatches: int, trips: float) -> None:
    step = replace(STEP, crossing=Crossing(4000.0, 6000.0, trips * microbatches))
    found = step_seconds(step, LINK, EDGE, CLOUD, microbatches, handling=FREE)
    busiest = max(found.edge - 0.5, found.cloud, 4.0, 3.0)
    assert found.hidden > 0
    assert found.total - 0.5 >= busiest - 1e-9
    assert found.total <= step_seconds(step, LINK, EDGE, CLOUD, 1, handling=FREE).total


def test_a_slower_link_is_never_faster() -> None:
    totals = [
        step_seconds(STEP, Link(delay, rate, rate), machine(1000.0), CLOUD, 4, handling=FREE).total
        for delay, rate in ((0.01, 1e4), (0.1, 1e4), (0.1, 1e3), (0.5, 1e2))
    ]
    assert totals == sorted(totals)
    assert len(set(totals)) == len(totals)


def test_which_blocks_run_where_follows_from_the_method() -> None:
    config = tiny_config("llama")  # 6 blocks, 32 wide
    head = SideFlops(2 * 5 * 32 * config.vocab_size, 2 * 5 * 32 * config.vocab_size)
    cut = Cut(1, 2)
    legs = (Leg(1, 1, 3),)
    assert passes_of(config, cut, 5, 10) == Passes(1, 3, 3, 1, 1, 3, 3, head, 10)
    assert passes_of(config, cut, 5, 10, forward_only=True) == Passes(1, 3, 2, 1, 0, 3, 0, head, 10)
    assert passes_of(config, cut, 5, 10, forward_only=True, known=True, legs=legs) == Passes(
        1, 2, 2, 0, 0, 0, 0, head, 10
    )
    assert passes_of(config, cut, 5, 10, beside=2, calls=2) == Passes(2, 5, 5, 1, 1, 3, 3, head, 10)
    assert passes_of(config, cut, 5, 10, whole=True) == Passes(1, 6, 6, 1, 1, 0, 0, head, 10)
    assert passes_of(config, cut, 5, 10, 4, legs=legs) == Passes(1, 3, 3, 1, 1, 3, 3, head, 10, 4, legs)


def slow_run(
    server: Server, rows: Path, cache: Path, out: Path, link: str
) -> tuple[list[float], list[dict[str, float]]]:
    """Seconds and ledger of each step but the first of a run over a slow line."""
    where = ["--server", server.address, "--insecure", "--cut", "1:1", "--link", link, "--threads", "1"]
    amount = ["--data", rows, "--out", out, "--steps", "3", "--batch-size", "24"]
    done = run_command("edge_client", "train", "--method", "split", *where, *amount, cache=cache)
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    spent = [line for line in lines if line["phase"] == "train"][1:]
    return [after - before for before, after in pairwise(ends)], spent


def test_on_a_slow_line_the_wire_takes_what_was_planned(
    servers: dict[str, Server], rows: Path, cache: Path, tmp_path: Path
) -> None:
    text = "50:0.3:0.6"
    seconds, spent = slow_run(servers["llama"], rows, cache, tmp_path / "run", text)
    for took, cost in zip(seconds, spent, strict=True):
        crossing = Crossing(cost["up_bytes"], cost["down_bytes"], cost["round_trips"])
        step = Step(crossing, SideFlops(cost["edge_forward_flops"], cost["edge_backward_flops"]))
        planned = step_seconds(step, Link.parse(text), Machine.by_hand(1e10), Machine.by_hand(1e10), handling=FREE)
        computed = sum(cost[f"{side}_{kind}_s"] for side in ("edge", "cloud") for kind in ("forward", "backward"))
        assert planned.wire > 5 * computed, "the line is what takes the time"
        assert took - computed == pytest.approx(planned.wire + planned.latency, rel=0.2)
        assert planned.wire == pytest.approx(crossing.up_bytes / (0.3 * MBIT) + crossing.down_bytes / (0.6 * MBIT))
