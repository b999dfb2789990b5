"""Fitting: the best plan within limits, which limit is in the way of a better one, and what to say where none fits."""

from collections.abc import Iterator

import pytest

from isthmus.planning.fit import Limits, fit
from isthmus.planning.plan import Plan
from tests.planning.plans_by_hand import plan

SMALL = plan("side", memory=2, size=2.0, hours=2.0)


def test_the_first_tier_with_a_plan_within_the_limits_is_taken_and_no_further_one_is_asked_for() -> None:
    asked: list[str] = []

    def tiers() -> Iterator[list[Plan]]:
        for name, size in (("dlora", 9.0), ("split", 3.0), ("side", 1.0)):
            asked.append(name)
            yield [plan(name, size=size)]

    fitted = fit(tiers(), Limits(max_bytes=4))
    assert fitted.plan is not None
    assert fitted.plan.name == "split"
    assert asked == ["dlora", "split"]


def test_all_plans_that_were_looked_at_are_counted_also_those_behind_the_one_taken() -> None:
    better = [plan("split", size=9.0), plan("split", size=8.0)]
    alike = [plan("side", trains=9, size=7.0), plan("side", trains=2), plan("side", trains=1)]
    fitted = fit([better, alike, [plan("offsite")]], Limits(max_bytes=4))
    assert fitted.plan is alike[1]
    assert fitted.tried == 5


def test_within_a_tier_more_parameters_are_better_and_then_fewer_seconds() -> None:
    few, slow, quick = plan("few", 1, hours=1.0), plan("slow", 2, hours=3.0), plan("quick", 2, hours=2.0)
    found = fit([[few, slow, quick]], Limits(max_hours=9.0))
    assert found.plan is quick
    assert found.binding == {}
    assert not found.together
    assert fit([[few, slow, quick]], Limits(max_hours=1.5)).plan is few


@pytest.mark.parametrize(
    ("name", "better", "limits"),
    [
        ("edge_memory", plan("split", memory=5), Limits(4, 10, 10.0)),
        ("max_bytes", plan("split", size=50.0), Limits(4, 10, 10.0)),
        ("max_hours", plan("split", hours=50.0), Limits(4, 10, 10.0)),
    ],
)
def test_a_limit_binds_where_lifting_it_alone_would_give_a_better_plan(name: str, better: Plan, limits: Limits) -> None:
    fitted = fit([[better], [SMALL]], limits)
    assert fitted.plan is SMALL
    assert fitted.binding == {name: better}


def test_limits_bind_together_where_a_better_plan_breaks_more_than_one() -> None:
    fitted = fit([[plan("dlora", memory=5, size=50.0)], [SMALL]], Limits(4, 10))
    assert fitted.plan is SMALL
    assert fitted.binding == {}
    assert fitted.together


def test_no_limit_binds_where_the_most_preferred_plan_is_taken() -> None:
    fitted = fit([[plan("dlora")], [SMALL]], Limits(4, 10, 10.0))
    assert fitted.plan is not None
    assert fitted.plan.name == "dlora"
    assert not fitted.together


def test_where_none_fits_each_limit_that_nobody_keeps_is_named_with_the_least_that_is_needed() -> None:
    fitted = fit([[plan("dlora", size=96.0, hours=4.0)], [plan("split", size=32.0, hours=2.0)]], Limits(9, 10, 1.0))
    assert fitted.plan is None
    assert [(short.limit, short.times, short.least.name) for short in fitted.shortages] == [
        ("max_bytes", 3.2, "split"),
        ("max_hours", 2.0, "split"),
    ]


def test_where_each_limit_is_kept_by_somebody_but_not_all_by_one_the_nearest_is_named() -> None:
    lean, quick = plan("lean", size=5.0, hours=40.0), plan("quick", size=30.0, hours=5.0)
    fitted = fit([[lean], [quick]], Limits(max_bytes=10, max_hours=10.0))
    assert fitted.plan is None
    assert fitted.shortages == ()
    assert fitted.nearest is quick


def test_a_limit_that_is_just_met_is_kept() -> None:
    fitted = fit([[plan("split", memory=4, size=10.0, hours=2.0)]], Limits(4, 10, 2.0))
    assert fitted.plan is not None


def test_nothing_to_choose_from_is_no_plan() -> None:
    fitted = fit([[], []], Limits(max_bytes=1))
    assert (fitted.plan, fitted.nearest, fitted.tried) == (None, None, 0)
