"""Kill-and-Revive keeps what earns its traffic, gives the dead their chance, and always decides the same."""

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.kill_revive import ROUND_TRIP_VALUES, Criterion, KillRevive, Plan, PortShape, Signal, select, traffic
from isthmus.errors import RunError, UsageError

WARMUP, PERIOD = 4, 5
World = Callable[[int, str, bool], Signal]
"""What a step measures at a port, by whether it is alive."""


def ladder(blocks: int = 8) -> dict[str, PortShape]:
    """In each block q and v, which share an input, and o, which has its own."""
    return {
        f"{block}.{module}": PortShape(block, group, own=100, shared=100)
        for block in range(blocks)
        for module, group in (("q", "attn"), ("v", "attn"), ("o", "out"))
    }


def plan(share: float = 1 / 8, criterion: Criterion = "importance", seed: int = 0, period: int = PERIOD) -> Plan:
    return Plan(share, period, WARMUP, criterion, seed)


def steady(worth: dict[str, float], others: float = 1.0) -> World:
    return lambda step, name, alive: Signal(0.0, worth.get(name, others), worth.get(name, others))


def drive(policy: KillRevive, world: World, steps: range) -> list[frozenset[str]]:
    """The active ports of each step."""
    active = []
    for step in steps:
        policy.decide(step)
        active.append(policy.active(step))
        policy.observe(step, {name: world(step, name, name in policy.alive) for name in active[-1]})
    return active


@pytest.mark.parametrize("criterion", ["importance", "gradient"])
@pytest.mark.parametrize("useful", ["0.q", "3.o", "7.v"])
def test_a_module_planted_as_the_only_useful_one_survives_every_decision(criterion: Criterion, useful: str) -> None:
    policy = KillRevive(ladder(), plan(share=1 / 24, criterion=criterion))
    drive(policy, steady({useful: 1.0}, others=0.0), range(60))
    assert [names for _, names in policy.decisions] == [(useful,)] * 12


@pytest.mark.parametrize("criterion", ["importance", "gradient"])
def test_a_killed_one_is_revived_when_the_task_changes(criterion: Criterion) -> None:
    policy = KillRevive(ladder(), plan(share=1 / 24, criterion=criterion))

    def world(step: int, name: str, alive: bool) -> Signal:
        worth = 1.0 if name == ("1.o" if step < 20 else "6.o") else 0.01
        return Signal(0.0, worth, worth)

    drive(policy, world, range(20))
    assert policy.alive == {"1.o"}
    drive(policy, world, range(20, 20 + PERIOD * (len(ladder()) + 1)))
    assert policy.alive == {"6.o"}


def test_what_an_incumbent_does_counts_for_it_until_it_is_killed() -> None:
    ports = {name: PortShape(0, name, 100, 100) for name in "ab"}
    policy = KillRevive(ports, Plan(0.5, 5, 1, "importance", seed=0))

    def decide_after(step: int, a: Signal, b: Signal) -> frozenset[str]:
        policy.observe(step, {"a": a, "b": b})
        policy.decide(step + 1)
        return policy.alive

    policy.decide(0)
    assert decide_after(0, a=Signal(9.0, 1.0, 0), b=Signal(0.0, 9.9, 0)) == {"a"}
    assert decide_after(5, a=Signal(9.0, 1.0, 0), b=Signal(0.0, 10.3, 0)) == {"b"}
    # Of the killed one's 10.0 only the 1.0 counts now, and half of it beside what it shows next.
    assert decide_after(10, a=Signal(0.0, 15.0, 0), b=Signal(0.0, 10.1, 0)) == {"b"}


def test_of_equal_scores_those_that_share_a_round_trip_win() -> None:
    ports = {
        "a": PortShape(0, "x", 100, 100),
        "b": PortShape(1, "x", 100, 100),
        "c": PortShape(2, "x", 100, 100),
        "d": PortShape(2, "x", 100, 100),
    }
    assert select(ports, dict.fromkeys(ports, 1.0), 2) == {"c", "d"}


def test_a_group_whose_ports_are_worth_a_round_trip_only_together_is_found() -> None:
    ports = {"single": PortShape(0, "x", 10, 100), "q": PortShape(1, "x", 10, 100), "v": PortShape(1, "x", 10, 100)}
    scores = {"single": 1.2, "q": 1.0, "v": 1.0}
    assert select(ports, scores, 2) == {"q", "v"}
    assert select(ports, scores, 1) == {"single"}


def test_of_a_group_the_ports_that_are_worth_most_for_their_own_values_come_first() -> None:
    ports = {"a": PortShape(0, "x", 5000, 100), "b": PortShape(0, "x", 10, 100), "c": PortShape(0, "x", 10, 100)}
    ports["single"] = PortShape(1, "x", 10, 100)
    assert select(ports, {"a": 1.1, "b": 1.0, "c": 1.0, "single": 1.2}, 2) == {"b", "c"}


def test_a_score_below_0_is_worth_nothing_at_any_price() -> None:
    ports = {"a": PortShape(0, "x", 10, 100), "b": PortShape(1, "x", 5000, 100), "c": PortShape(2, "x", 10, 100)}
    assert select(ports, {"a": -1.0, "b": -1.0, "c": 0.1}, 2) == {"a", "c"}


def test_a_strong_port_carries_its_cheap_neighbour_but_a_much_stronger_stranger_wins() -> None:
    ports = ladder(2)
    scores = dict.fromkeys(ports, 0.0) | {"0.q": 10.0, "0.v": 1.0, "1.o": 2.0}
    assert select(ports, scores, 2) == {"0.q", "0.v"}
    assert select(ports, scores | {"1.o": 9.0}, 2) == {"0.q", "1.o"}


def test_traffic_counts_and_its_price_decides() -> None:
    ports = {"narrow": PortShape(0, "x", 100, 100), "wide": PortShape(1, "x", 5000, 100)}
    assert select(ports, {"narrow": 1.0, "wide": 2.0}, 1) == {"narrow"}
    assert select(ports, {"narrow": 1.0, "wide": 20.0}, 1) == {"wide"}


def test_a_block_whose_last_port_dies_costs_nothing() -> None:
    q, v, o = PortShape(0, "attn", 3, 50), PortShape(0, "attn", 4, 50), PortShape(0, "out", 5, 60)
    assert traffic([q, v, o]) - traffic([v, o]) == 3
    assert traffic([v, o]) - traffic([o]) == 4 + 50 + 2 * ROUND_TRIP_VALUES
    assert traffic([o]) == 5 + 60 + 2 * ROUND_TRIP_VALUES
    assert traffic([]) == 0
    assert traffic([v], opened={(0, "attn")}) == 4
    assert traffic([v], opened={(1, "attn"), (0, "out")}) == 4 + 50 + 2 * ROUND_TRIP_VALUES


SIGNALS = st.floats(0, 1e6, allow_subnormal=False)
CRITERIA: st.SearchStrategy[Criterion] = st.sampled_from(["importance", "gradient", "random", "top"])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        draw(st.floats(0.01, 1)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        draw(CRITERIA),
        draw(st.integers(0, 9)),
    )


PORTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.builds(PortShape, st.integers(0, 2), st.sampled_from(["x", "y"]), st.integers(0, 99), st.just(50)),
    min_size=1,
    max_size=8,
)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    drawn = draw(st.lists(st.builds(Signal, SIGNALS, SIGNALS, SIGNALS), min_size=1, max_size=7))
    return lambda step, name, alive: drawn[(step * 31 + sum(map(ord, name))) % len(drawn)]


@given(PORTS, plans(), worlds())
def test_exactly_the_share_is_alive_after_the_first_decision(
    ports: dict[str, PortShape], drawn: Plan, world: World
) -> None:
    policy = KillRevive(ports, drawn)
    count = max(1, math.floor(drawn.share * len(ports) + 1e-9))
    for step in range(16):
        policy.decide(step)
        decided = drawn.criterion in ("random", "top") or step >= drawn.warmup
        assert len(policy.alive) == (count if decided else len(ports))
        active = policy.active(step)
        assert policy.alive <= active <= ports.keys()
        assert len(active) <= len(policy.alive) + count
        policy.observe(step, {name: world(step, name, name in policy.alive) for name in active})


@given(PORTS, plans(), worlds(), st.integers(0, 15))
def test_a_state_taken_at_any_step_and_sent_through_json_has_the_same_future(
    ports: dict[str, PortShape], drawn: Plan, world: World, at: int
) -> None:
    whole, resumed = KillRevive(ports, drawn), KillRevive(dict(reversed(ports.items())), drawn)
    drive(whole, world, range(at))
    resumed.load(json.loads(json.dumps(whole.state())))
    assert drive(resumed, world, range(at, 20)) == drive(whole, world, range(at, 20))
    assert resumed.decisions == whole.decisions
    assert resumed.state() == whole.state()


@given(PORTS, plans(), worlds())
def test_the_order_in_which_ports_and_signals_are_given_changes_nothing(
    ports: dict[str, PortShape], drawn: Plan, world: World
) -> None:
    one, other = KillRevive(ports, drawn), KillRevive(dict(reversed(ports.items())), drawn)
    for step in range(12):
        assert one.decide(step) == other.decide(step)
        signals = {name: world(step, name, name in one.alive) for name in sorted(one.active(step))}
        one.observe(step, signals)
        other.observe(step, dict(reversed(signals.items())))
    assert one.state() == other.state()


def test_asking_for_the_active_ports_changes_nothing() -> None:
    policy = KillRevive(ladder(), plan())
    drive(policy, steady({}), range(8))
    policy.decide(8)
    before = policy.state()
    assert policy.active(8) == policy.active(8)
    assert policy.state() == before


@pytest.mark.parametrize("criterion", ["importance", "gradient"])
def test_the_dead_are_probed_only_before_decisions_each_in_its_turn_and_by_seed(criterion: Criterion) -> None:
    ports, count = ladder(), 3
    policy = KillRevive(ports, plan(criterion=criterion))
    best = {"5.o": 9.0, "6.q": 9.0, "6.v": 9.0}
    turns = -(-(len(ports) - count) // count)
    active = drive(policy, steady(best), range(WARMUP + PERIOD * turns))
    assert active[:WARMUP] == [frozenset(ports)] * WARMUP
    probes = [names - best.keys() for names in active[WARMUP:]]
    assert [len(names) for names in probes] == ([0] * (PERIOD - 1) + [count]) * turns
    assert frozenset().union(*probes) == ports.keys() - best.keys()
    other = drive(KillRevive(ports, plan(criterion=criterion, seed=1)), steady(best), range(WARMUP + PERIOD))
    assert other[-1] != active[WARMUP + PERIOD - 1]


def test_a_probed_port_is_active_but_not_alive() -> None:
    policy = KillRevive(ladder(), plan())
    active = drive(policy, steady({}), range(WARMUP + PERIOD))
    assert len(active[-1]) == 6
    assert len(policy.alive) == 3


@given(st.floats(0.7, 0.95))
def test_old_scores_of_the_dead_do_not_beat_the_alive_when_all_gradients_shrink(shrink: float) -> None:
    policy = KillRevive(ladder(), plan())
    best = {"5.o": 3.0, "6.q": 3.0, "6.v": 3.0}
    drive(policy, lambda step, name, alive: Signal(0.0, best.get(name, 1.0) * shrink**step, 0.0), range(150))
    assert {names for _, names in policy.decisions} == {("5.o", "6.q", "6.v")}


def test_a_score_that_nothing_confirms_fades() -> None:
    ports = {name: PortShape(0, name, 100, 100) for name in "abc"}
    policy = KillRevive(ports, Plan(1 / 3, 2, 1, "importance", seed=0))
    policy.decide(0)
    policy.observe(0, {"a": Signal(0, 3.0, 0), "b": Signal(0, 2.0, 0), "c": Signal(0, 1.0, 0)})
    for step in range(1, 6):
        policy.decide(step)
        policy.observe(step, {"a": Signal(0, 3.0, 0)})
    scores = {name: score[1] for name, score in policy.state()["scores"].items()}
    assert scores == pytest.approx({"a": 3.0, "b": 2.0 * 0.9**2, "c": 1.0 * 0.9**2})


@pytest.mark.parametrize("nearly", [0.0, 5e-324])
def test_steps_that_measure_nothing_neither_stop_later_ones_from_counting_nor_blow_up(nearly: float) -> None:
    policy = KillRevive(ladder(), plan(share=1 / 24))
    policy.observe(0, {name: Signal(0.0, nearly, 0.0) for name in ladder()})
    policy.observe(1, {name: Signal(0.0, 1e300 if name == "2.o" else 1e299, 0.0) for name in ladder()})
    policy.observe(2, {name: Signal(0.0, nearly, 0.0) for name in ladder()})
    policy.decide(WARMUP)
    assert policy.alive == {"2.o"}


def test_the_gradient_criterion_looks_at_norms_alone_and_at_no_traffic() -> None:
    ports = {"a": PortShape(0, "x", 10, 10), "b": PortShape(0, "x", 10, 10), "c": PortShape(1, "x", 9000, 10)}
    policy = KillRevive(ports, plan(share=2 / 3, criterion="gradient"))
    signals = {"a": Signal(0.0, 0.0, 3.0), "b": Signal(9.0, 9.0, 1.0), "c": Signal(0.0, 0.0, 2.0)}
    drive(policy, lambda step, name, alive: signals[name], range(WARMUP + 1))
    assert policy.alive == {"a", "c"}


def test_what_is_not_finite_says_nothing() -> None:
    policy = KillRevive(ladder(), plan())
    drive(policy, steady({"2.o": 9.0}), range(3))
    before = policy.state()
    policy.observe(3, {name: Signal(float("inf"), float("nan"), float("nan")) for name in ladder()})
    assert policy.state() == before


def test_random_draws_once_at_step_0_by_seed() -> None:
    def drawn(seed: int) -> KillRevive:
        policy = KillRevive(ladder(), plan(criterion="random", seed=seed))
        active = drive(policy, steady({"2.o": 9.0}), range(30))
        assert set(active) == {policy.alive}
        assert [step for step, _ in policy.decisions] == [0]
        return policy

    assert len(drawn(0).alive) == 3
    assert drawn(0).alive == drawn(0).alive
    assert len({drawn(seed).alive for seed in range(8)}) > 4


def test_top_keeps_the_highest_blocks_from_step_0() -> None:
    policy = KillRevive(ladder(12), plan(share=1 / 9, criterion="top"))
    active = drive(policy, steady({"2.o": 9.0}), range(30))
    assert set(active) == {frozenset({"11.o", "11.q", "11.v", "10.o"})}
    assert policy.decisions == [(0, ("10.o", "11.o", "11.q", "11.v"))]


def test_scores_found_elsewhere_are_the_first_and_what_is_measured_goes_on_from_them() -> None:
    ports, found = ladder(), frozenset({"2.q", "2.v"})
    scores = dict.fromkeys(ports, 0.1) | {"0.o": 1.0} | dict.fromkeys(found, 0.9)
    policy = KillRevive(ports, Plan(1 / 12, PERIOD, WARMUP, "importance", 0, scores))
    assert policy.alive == ports.keys()
    change = policy.decide(0)
    assert change is not None
    assert (change.killed, change.revived) == (frozenset(ports) - found, frozenset[str]())
    confirmed = drive(policy, steady(dict.fromkeys(found, 90.0), others=10.0), range(1, 40))
    assert {found} == {active for step, active in enumerate(confirmed, start=1) if (step + 1) % PERIOD}
    assert {names for _, names in policy.decisions} == {("2.q", "2.v")}
    drive(policy, steady({"7.o": 900.0}, others=1.0), range(40, 40 + PERIOD * len(ports)))
    assert "7.o" in policy.alive


@pytest.mark.parametrize("criterion", ["importance", "gradient", "random", "top"])
def test_a_share_of_1_kills_and_probes_nothing(criterion: Criterion) -> None:
    policy = KillRevive(ladder(), Plan(1.0, PERIOD, 0, criterion, seed=0))
    assert [policy.decide(step) for step in range(20)] == [None] * 20
    assert set(drive(policy, steady({}), range(20))) == {frozenset(ladder())}
    assert policy.decisions == []


def test_a_change_names_the_killed_and_the_revived_and_the_report_can_read_it() -> None:
    policy = KillRevive(ladder(), plan(share=1 / 24))
    drive(policy, steady({"3.o": 9.0}), range(WARMUP))
    first = policy.decide(WARMUP)
    assert first is not None
    assert (first.killed, first.revived) == (frozenset(ladder()) - {"3.o"}, frozenset[str]())
    assert policy.decide(WARMUP + 1) is None
    assert policy.decisions == [(WARMUP, ("3.o",))]


def test_a_state_of_other_ports_is_refused() -> None:
    policy = KillRevive(ladder(7), plan())
    with pytest.raises(RunError, match="other ports"):
        policy.load(KillRevive(ladder(8), plan()).state())
    assert policy.alive == ladder(7).keys()


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="--kr-active"):
        plan(share=share)


def test_a_plan_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(UsageError, match="--kr-period"):
        plan(period=0)
    with pytest.raises(UsageError, match="at least 1 steps"):
        Plan(0.5, PERIOD, 0, "importance", seed=0)
    with pytest.raises(UsageError, match="at least 0 steps"):
        Plan(0.5, PERIOD, -1, "random", seed=0)
    with pytest.raises(UsageError, match="--targets"):
        KillRevive({}, plan())


@pytest.mark.parametrize("wrong", [{"0.q": float("nan")}, {"0.q": float("inf")}, {}])
def test_scores_that_lack_a_port_are_refused_by_its_name(wrong: dict[str, float]) -> None:
    scores = {name: 1.0 for name in ladder() if name != "0.q"} | wrong
    with pytest.raises(UsageError, match=r"0\.q"):
        KillRevive(ladder(), Plan(0.5, PERIOD, WARMUP, "importance", 0, scores))
