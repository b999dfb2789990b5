"""Of several runs those are on a front that no other one beats; only what can be compared is compared."""

import random

import pytest

from isthmus.report.evaluated import Kept
from isthmus.report.fields.cost import ByPhase, Traffic
from isthmus.report.fields.score import Evaluation, Score
from isthmus.report.fronts import COSTS, Front, groups
from isthmus.report.schema import RunReport
from tests.report.example import costing, report
from tests.report.offsite_example import EMULATED, HELD_OUT, TUNED, ZERO, evaluated, kept, offsite, score, scored

NOWHERE: dict[str, Kept] = {}


def run(accuracy: float | None, up: int, trips: int = 10, flops: int | None = 8, **changed: object) -> RunReport:
    """A run with a loss of 1 - accuracy and these costs; no accuracy is a loss of 0.5 alone."""
    after = Score(loss=0.5 if accuracy is None else 1 - accuracy, accuracy=accuracy)
    ended = report(**{"eval": Evaluation(rows=10, before=after, after=after), "eval_data": HELD_OUT, **changed})
    edge = {"forward_flops": flops, "backward_flops": flops}
    return costing(ended, wire={"up_bytes": up, "down_bytes": 5, "round_trips": trips}, edge=edge)


def front(reports: dict[str, RunReport], cost: str = "bytes") -> Front:
    (group,) = groups(reports, NOWHERE)
    return next(front for front in group.fronts if front.cost == cost)


def test_a_run_is_dominated_by_those_that_cost_no_more_and_are_no_worse() -> None:
    found = front({"cheap": run(0.7, 100), "dear": run(0.9, 900), "worse": run(0.6, 100), "waste": run(0.9, 1_000)})
    assert {point.run: point.beaten_by for point in found.points} == {
        "cheap": (),
        "dear": (),
        "worse": ("cheap",),
        "waste": ("dear",),
    }
    assert [point.run for point in found.points if point.on_front] == ["cheap", "dear"]
    assert [point.cost for point in found.points] == [105, 105, 905, 1_005]


def test_equal_runs_do_not_beat_each_other() -> None:
    assert all(point.on_front for point in front({"one": run(0.7, 100), "other": run(0.7, 100)}).points)


def test_each_cost_has_a_front_of_its_own() -> None:
    reports = {"few": run(0.8, 900, trips=2, flops=9), "small": run(0.8, 100, trips=50, flops=9)}
    best = {cost: [point.run for point in front(reports, cost).points if point.on_front] for cost in COSTS}
    assert best == {"bytes": ["small"], "round trips": ["few"], "edge FLOPs": ["few", "small"]}


@pytest.mark.parametrize("seed", range(20))
def test_fronts_are_those_that_a_sweep_from_cheap_to_dear_finds(seed: int) -> None:
    drawn = random.Random(seed)
    reports = {f"run-{at}": run(drawn.randrange(6) / 10, drawn.randrange(8)) for at in range(12)}
    best, swept = -1.0, set()
    costs = sorted({each.cost.wire.up_bytes for each in reports.values()})
    for cost in costs:
        level = {
            name: each.eval.after.accuracy or 0 for name, each in reports.items() if each.cost.wire.up_bytes == cost
        }
        if max(level.values()) > best:
            best = max(level.values())
            swept |= {name for name, accuracy in level.items() if accuracy == best}
    assert {point.run for point in front(reports).points if point.on_front} == swept


def test_without_any_accuracy_the_least_loss_wins() -> None:
    reports = {"good": run(None, 100), "bad": run(None, 100)}
    reports["bad"] = reports["bad"].model_copy(
        update={"eval": Evaluation(rows=10, before=score(None, 3.0), after=score(None, 2.0))}
    )
    found = front(reports)
    assert (found.measure, [point.run for point in found.points if point.on_front]) == ("loss", ["good"])


def test_runs_without_an_accuracy_or_a_cost_are_left_out_where_others_have_one_and_named() -> None:
    unscored = run(0.5, 1, eval=Evaluation(rows=None, before=score(None, None), after=score(None, None)))
    (group,) = groups({"scored": run(0.7, 100), "lost": run(None, 1), "killed": unscored}, NOWHERE)
    assert group.left_out == {"lost": "no accuracy after training", "killed": "no accuracy after training"}
    assert [[point.run for point in each.points] for each in group.fronts] == [["scored"]] * 3
    uncounted = front({"counted": run(0.7, 100), "uncounted": run(0.9, 1, flops=None)}, "edge FLOPs")
    assert [point.run for point in uncounted.points] == ["counted"]


def test_the_whole_model_on_the_edge_is_a_reference_that_beats_nobody() -> None:
    found = front({"local": run(0.99, 0, method="local"), "split": run(0.7, 100)})
    assert {point.run: (point.on_front, point.reference) for point in found.points} == {
        "local": (False, True),
        "split": (True, False),
    }


def test_runs_scored_on_other_rows_are_not_compared() -> None:
    other = run(0.2, 900, eval_data="0e" * 32)
    found = groups({"one": run(0.9, 1), "other": other}, NOWHERE)
    assert [[point.run for point in group.fronts[0].points] for group in found] == [["one"], ["other"]]
    assert all(point.on_front for group in found for point in group.fronts[0].points)


def test_a_run_on_an_emulator_counts_by_the_true_span_and_by_its_bundle() -> None:
    runs = {"off": offsite(EMULATED, TUNED), "split": scored(ZERO, score(80, 0.4))}
    (unplugged,) = groups(runs, kept(runs))
    assert [point.run for point in unplugged.fronts[0].points] == ["split"]
    assert "plug it in" in unplugged.left_out["off"]
    (group,) = groups(runs, kept(runs, evaluated(score(84, 0.36))))
    point = next(point for point in group.fronts[0].points if point.run == "off")
    assert (point.quality, point.cost) == (0.84, 160_000_000)


def test_an_emulator_whose_size_nobody_knows_has_no_place_among_bytes() -> None:
    runs = {"off": offsite(EMULATED, TUNED), "split": scored(ZERO, score(80, 0.4))}
    nothing = dict.fromkeys(ByPhase.model_fields, Traffic(up_bytes=0, down_bytes=0))
    runs["off"] = costing(runs["off"], wire={"by_phase": ByPhase(**nothing)})
    (group,) = groups(runs, kept(runs, evaluated(score(84, 0.36))))
    assert {front.cost: [point.run for point in front.points] for front in group.fronts} == {
        "bytes": ["split"],
        "round trips": ["off", "split"],
        "edge FLOPs": ["split", "off"],
    }
