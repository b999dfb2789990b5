"""The table of offsite tuning: each row is from where it must be, and costs what was measured."""

from typing import Any

import pytest

from isthmus.report.evaluated import Line
from isthmus.report.fields.run import BegunFrom
from isthmus.report.gains import in_words
from isthmus.report.offsite import Row, tables
from isthmus.report.schema import RunReport
from tests.report.example import costing, report
from tests.report.offsite_example import (
    EMULATED,
    FULL,
    ON,
    OTHER,
    PLUGGED,
    TUNED,
    ZERO,
    alone,
    carried_on,
    evaluated,
    everything,
    kept,
    offsite,
    per_row,
    score,
    scored,
    spending,
    table,
)

FILLED = "untouched model", "untouched emulator", "tuned on the emulator", "plugged in", "plus 10 true steps"


def row(label: str, runs: dict[str, RunReport], *lines: Line) -> Row:
    (found,) = (one for one in table(runs, *lines).rows if one.label == label)
    return found


def test_the_rows_stand_from_the_untouched_model_to_the_true_span_throughout_with_their_scores() -> None:
    rows, scores = table(everything()).rows, [ZERO, EMULATED, TUNED, PLUGGED, ON, FULL]
    assert [one.label for one in rows] == [*FILLED, "true span throughout"]
    assert [one.score for one in rows] == scores
    assert [one.per_row for one in rows] == list(map(per_row, scores))
    assert [one.runs for one in rows] == [("full",), ("off",), ("off",), ("off", "on"), ("off", "on"), ("full",)]


def test_only_a_run_on_an_emulator_has_a_table() -> None:
    assert [made.name for made in tables({**everything(), "two": offsite(ZERO, ON)}, {})] == ["off", "two"]
    assert not tables({"full": scored(ZERO, FULL)}, {})


def test_the_latest_evaluation_on_the_true_span_goes_before_what_other_runs_say() -> None:
    lines = evaluated(ON), evaluated(TUNED, span="local"), evaluated(FULL, span="emulated", emulator=OTHER)
    assert row("plugged in", everything(), *lines).score == TUNED
    assert row("plugged in", everything(), *lines).per_row == per_row(TUNED)
    assert row("untouched model", everything(), evaluated(ON, untouched=True), *lines).score == ON
    assert row("plugged in", everything(), evaluated(ON, untouched=True)).score == PLUGGED


def test_an_adapter_that_is_no_longer_the_runs_is_not_what_was_plugged_in() -> None:
    """A run that was stopped, evaluated and resumed has another adapter than the one evaluated."""
    early = evaluated(PLUGGED, adapter=OTHER)
    assert row("plugged in", alone(), early).score is None
    assert row("plugged in", alone(), evaluated(ON), early).score == ON
    assert row("plugged in", alone(adapter=OTHER), evaluated(ON), early).score == PLUGGED
    assert row("plugged in", alone(adapter=None), early, evaluated(ZERO, untouched=True)).score is None
    assert row("untouched model", alone(adapter=OTHER), evaluated(ZERO, untouched=True)).score == ZERO


def test_scores_on_other_rows_of_another_model_or_cut_or_adapter_fill_no_row() -> None:
    assert row("plugged in", alone(), evaluated(PLUGGED, data=OTHER)).score is None
    assert row("untouched model", alone(), evaluated(ZERO, data=OTHER, untouched=True)).score is None
    others: list[dict[str, Any]] = [{"eval_data": OTHER}, {"model_digest": OTHER}, {"cut": "1:1"}, {"method": "dlora"}]
    for other in (*others, {"begun_from": BegunFrom(method="offsite", adapter=OTHER)}):
        on, full = carried_on(PLUGGED, ON, **other), scored(ZERO, FULL, **other)
        made = table({**alone(), "on": on, "full": full})
        assert [one.score for one in made.rows] == [None, EMULATED, TUNED, None, None, None], other


def test_a_run_that_began_with_another_ones_adapter_does_not_call_its_emulator_untouched() -> None:
    made = table(alone(begun_from=BegunFrom(method="split", adapter=OTHER)))
    assert made.rows[1].label == "emulator, before"
    assert in_words(made) == ("off began with the adapter of an earlier run (split); what that cost is not in it.",)


def test_each_run_that_carried_on_has_a_row_the_fewest_steps_first() -> None:
    runs = {**alone(), "more": carried_on(PLUGGED, FULL, 1_200), "one": carried_on(PLUGGED, ON, 1)}
    labels = [one.label for one in table(runs).rows]
    assert labels[4:6] == ["plus 1 true step", "plus 1,200 true steps"]


def test_of_runs_on_the_true_span_the_likest_is_shown_and_not_the_best() -> None:
    params = report().params.model_copy(update={"trainable": 99})
    runs = {
        **alone(),
        "fewer": scored(ZERO, FULL, steps=100, params=params),
        "steps": scored(ZERO, score(99, 0.1), steps=300),
        "peft": scored(ZERO, score(98, 0.1), steps=100, peft_type="BITFIT"),
        "like": scored(ZERO, FULL, steps=110),
        "unfinished": scored(ZERO, score(None, None), steps=100),
    }
    assert table(runs).throughout.runs == ("like",)
    assert in_words(table(runs))[0] == (
        "like, on the true span throughout, was not the same tuning: 110 steps where this one had 100."
    )
    del runs["like"], runs["steps"], runs["fewer"]
    assert "BITFIT where this one had LORA." in in_words(table(runs))[0]
    fewer = {**alone(), "full": scored(ZERO, FULL, steps=100, params=params)}
    assert "99 trained parameters where this one had 230,400." in in_words(table(fewer))[0]


def test_figures_of_rows_that_do_not_come_to_the_runs_score_are_not_taken_for_its_own() -> None:
    """A directory whose scores.json is of another attempt than its run.json."""
    assert per_row(TUNED).are_of(TUNED)
    assert not per_row(TUNED).are_of(score(75.5, 0.43))
    assert not per_row(TUNED).are_of(score(75.6, 0.42))
    assert not per_row(TUNED).are_of(score(None, None))
    beside = kept(alone())
    (made,) = tables({"off": offsite(EMULATED, PLUGGED)}, beside)
    assert (made.before.per_row, made.tuned.per_row) == (per_row(EMULATED), None)


def test_costs_are_those_of_all_the_runs_that_made_a_row() -> None:
    tuned = row("tuned on the emulator", everything()).spent
    assert vars(tuned) == {
        "wire_bytes": 160_000_000,
        "fetch_bytes": 160_000_000,
        "here_bytes": 0,
        "train_bytes": 0,
        "score_bytes": 0,
        "look_bytes": 0,
        "flops": 12 * 10**12,
        "memory_bytes": 911_000_000,
        "tensor_bytes": 312_000_000,
        "tokens_per_s": 250.0,
    }
    assert row("plugged in", everything(), evaluated(PLUGGED)).spent.wire_bytes == 200_000_000
    on = costing(everything()["on"], edge={"peak_memory_bytes": 5 * 10**9, "peak_tensor_bytes": 7})
    spent = row("plus 10 true steps", {**everything(), "on": on}).spent
    assert (spent.wire_bytes, spent.flops) == (167_000_000, 13 * 10**12)
    assert (spent.memory_bytes, spent.tensor_bytes) == (5 * 10**9, 312_000_000)
    assert spent.tokens_per_s == pytest.approx(2_000 / (1_000 / 250 + 1_000 / 50))
    assert row("true span throughout", everything()).spent.wire_bytes == 381_202_558


def test_what_crossed_stands_apart_by_what_it_was_for() -> None:
    """So that a fetch, which the next run is spared, and looks, which nobody needs, are in no other figure."""

    def crossed(label: str, runs: dict[str, RunReport], *lines: Line) -> tuple[int | None, ...]:
        spent = row(label, runs, *lines).spent
        return spent.fetch_bytes, spent.here_bytes, spent.train_bytes, spent.score_bytes, spent.look_bytes

    full = everything()["full"].cost.wire.by_phase
    evaluating, training = (phase.up_bytes + phase.down_bytes for phase in (full.eval, full.train))
    fetching = full.fetch.up_bytes + full.fetch.down_bytes
    assert crossed("true span throughout", everything()) == (fetching, 0, training, evaluating, 0)
    assert crossed("plugged in", alone(), evaluated(PLUGGED)) == (160_000_000, 0, 0, 40_000_000, 0)
    ends = evaluated(PLUGGED, fetched_bytes=7)
    assert crossed("plugged in", alone(), ends) == (160_000_007, 0, 0, 40_000_000, 0)
    assert row("plugged in", alone(), ends).spent.wire_bytes == 200_000_007
    looked = costing(alone()["off"], wire={"by_phase": full})
    assert crossed("tuned on the emulator", {"off": looked}) == (fetching, 0, training, 0, evaluating)


def test_a_bundle_that_was_here_already_is_counted_apart_from_what_crossed() -> None:
    off = spending(everything()["off"], down=0, flops=0, rate=1.0)
    assert off.offsite is not None
    known = off.model_copy(update={"offsite": off.offsite.model_copy(update={"bundle_bytes": 275})})
    for run, here in ((off, None), (known, 275)):
        tuned = row("tuned on the emulator", {"off": run}).spent
        assert (tuned.fetch_bytes, tuned.here_bytes) == (0, here)
        both = row("plus 10 true steps", {**everything(), "off": run}).spent
        assert (both.fetch_bytes, both.here_bytes) == (7_000_000, here)
    local = spending(everything()["full"], down=0, flops=0, rate=1.0).model_copy(update={"method": "local"})
    assert row("true span throughout", {**everything(), "full": local}).spent.here_bytes == 0


def test_what_was_not_measured_apart_is_not_claimed() -> None:
    assert row("plugged in", everything()).spent.wire_bytes is None
    assert row("plugged in", everything()).spent.flops == 12 * 10**12
    for label in FILLED[:2]:
        assert set(vars(row(label, everything()).spent).values()) == {None}
    run = costing(everything()["off"], edge={"backward_flops": None, "peak_memory_bytes": None})
    spent = row("plus 10 true steps", {**everything(), "off": run}).spent
    assert (spent.flops, spent.memory_bytes, spent.tensor_bytes) == (None, None, 312_000_000)
