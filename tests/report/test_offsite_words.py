"""The words under the table of offsite tuning claim what paired intervals of the same rows show, and no more."""

import pytest

from isthmus.report.evaluated import PerRow
from isthmus.report.fields.score import Score
from isthmus.report.gains import in_words
from tests.report.offsite_example import (
    FULL,
    PLUGGED,
    TUNED,
    ZERO,
    alone,
    carried_on,
    evaluated,
    everything,
    offsite,
    per_row,
    score,
    scored,
    table,
)


def words(
    plugged: Score,
    figures: PerRow | None = None,
    *,
    zero: Score = ZERO,
    tuned: Score = TUNED,
    full: Score | None = None,
) -> list[str]:
    """What is said where the model was scored so before, after plugging in, and tuned on the true span throughout."""
    runs = {"off": offsite(score(62, 0.6), tuned)} | ({"full": scored(zero, full, steps=100)} if full else {})
    return list(in_words(table(runs, evaluated(plugged, figures), evaluated(zero, untouched=True))))


def test_a_gain_is_said_in_points_and_in_loss_with_its_paired_interval() -> None:
    assert words(PLUGGED, per_row(PLUGGED, spread=0.2))[0] == (
        "Plugging in gained over the untouched model: "
        "accuracy +6.0 points [+4.5, +7.5], loss -0.1200 [-0.1262, -0.1138]."
    )
    only_loss = words(score(None, 0.36), zero=score(None, 0.48), tuned=score(None, 0.42))
    assert only_loss[0] == "Plugging in gained over the untouched model: loss -0.1200 [-0.1200, -0.1200]."


def test_a_gain_that_unpaired_intervals_would_call_noise_is_told_by_paired_ones() -> None:
    better = score(80, 0.48)
    assert ZERO.accuracy_interval is not None
    assert better.accuracy_interval is not None
    assert better.accuracy_interval[0] < ZERO.accuracy_interval[1]
    said = words(better, per_row(better, spread=0.3))[0]
    assert said.startswith("Plugging in gained over the untouched model: accuracy +2.0 points [+1.")
    assert said.endswith("loss +0.0000 [-0.0124, +0.0124] (1,000 rows do not tell).")


def test_a_gain_that_other_rows_could_undo_is_no_gain() -> None:
    """A point more, of hundreds of rows that changed either way; and losses further apart than their mean is."""
    noisy = words(score(79, 0.47), per_row(score(79, 0.47), others=200, spread=0.5))[0]
    assert noisy.startswith("1,000 rows do not tell whether plugging in gained over the untouched model: ")
    assert noisy.endswith("accuracy +1.0 points [-2.9, +4.9], loss -0.0100 [-0.0348, +0.0148].")
    one = words(score(79, 0.4), per_row(score(79, 0.4), others=200))[0]
    assert one == (
        "Plugging in gained over the untouched model: "
        "accuracy +1.0 points [-2.9, +4.9] (1,000 rows do not tell), loss -0.0800 [-0.0800, -0.0800]."
    )


def test_that_plugging_in_made_things_worse_is_said_where_the_rows_tell_it() -> None:
    worse = "Plugging in made things worse than the untouched model: "
    assert words(score(70, 0.5))[0].startswith(f"{worse}accuracy -8.0 points [-9.7, -6.3], loss +0.0200 [")
    assert words(score(None, 0.5), zero=score(None, 0.48))[0].startswith(worse)
    assert words(score(78, 0.5))[0].startswith(worse)
    slightly = words(score(77, 0.49), per_row(score(77, 0.49), others=200, spread=0.5))[0]
    assert slightly.startswith("1,000 rows do not tell")


def test_where_one_measure_rose_and_the_other_fell_both_are_named() -> None:
    assert words(score(84, 0.5))[0].startswith(
        "Plugging in made accuracy better and loss worse than the untouched model: accuracy +6.0 points ["
    )
    assert words(score(70, 0.4))[0].startswith(
        "Plugging in made loss better and accuracy worse than the untouched model: accuracy -8.0 points ["
    )


def test_no_change_is_called_neither_gain_nor_loss() -> None:
    for same in (ZERO, score(78, 0.48001)):
        assert words(same)[0].startswith("1,000 rows do not tell whether plugging in gained")


@pytest.mark.parametrize("without", [("off",), ("on",), ("full",)])
def test_runs_of_which_only_the_report_is_there_are_not_judged(without: tuple[str, ...]) -> None:
    """Such as a run of another machine."""
    none = " cannot be compared row by row, for want of both ones' figures of the same rows: "
    gain, share, protection, *_ = in_words(table(everything(), without=without))
    if without == ("off",):
        assert gain.startswith("Plugging in gained")
        assert protection == (f"The plugged-in model and the tuned emulator{none}accuracy +8.5 points, loss -0.0600.")
    if without == ("on",):
        assert gain == f"The plugged-in and the untouched model{none}accuracy +6.0 points, loss -0.1200."
        assert share.endswith(
            ": plugging in cannot be compared row by row; plus 10 true steps cannot be compared row by row."
        )
    if without == ("full",):
        assert gain.startswith(f"The plugged-in and the untouched model{none}")
        assert share == (
            f"The untouched model and that tuned on the true span throughout{none}accuracy +9.4 points, loss -0.1700."
        )
        assert protection.startswith("The plugged-in model is better")


def test_rows_that_were_shortened_to_another_length_are_not_compared() -> None:
    figures = per_row(PLUGGED)
    shorter = figures.model_copy(update={"tokens": (1, *figures.tokens[1:])})
    assert "cannot be compared row by row" in words(PLUGGED, shorter)[0]


def test_the_share_is_of_the_gain_of_tuning_on_the_true_span_throughout_and_true_steps_have_theirs() -> None:
    assert in_words(table(everything()))[1] == (
        "Of the gain of tuning on the true span throughout (accuracy +9.4 points [+7.6, +11.3], "
        "loss -0.1700 [-0.1700, -0.1700]): plugging in has about 64 % in accuracy and about 71 % in loss; "
        "plus 10 true steps about 94 % in accuracy and about 94 % in loss."
    )
    assert words(score(77, 0.5), full=FULL)[1].endswith("plugging in has none in accuracy and none in loss.")
    undecided = words(score(79, 0.4), per_row(score(79, 0.4), others=200), full=FULL)[1]
    assert undecided.endswith("plugging in has none that 1,000 rows tell in accuracy and about 47 % in loss.")


def test_where_the_true_span_gained_nothing_there_is_no_share() -> None:
    (said,) = words(PLUGGED, full=score(70, 0.49))[1:-1]
    assert said.startswith("Tuning on the true span throughout made things worse in accuracy and loss (accuracy -8.0 ")
    assert said.endswith("): there is no share of it.")
    runs = {**alone(), "on": carried_on(PLUGGED, FULL), "full": scored(ZERO, score(78, 0.3), steps=100)}
    _, share, none, *_ = in_words(table(runs))
    assert share.endswith(": plugging in has about 67 % in loss; plus 10 true steps about 94 % in loss.")
    assert none.startswith(
        "1,000 rows do not tell whether tuning on the true span throughout gained in accuracy (accuracy +0.0 points ["
    )
    assert none.endswith("): there is no share of it.")


def test_the_owners_protection_is_plugged_in_minus_the_tuned_emulator() -> None:
    assert words(PLUGGED)[-1].startswith(
        "The plugged-in model is better than the tuned emulator alone, which is the owner's protection: "
        "accuracy +8.5 points [+6.8, +10.3], loss -0.0600 ["
    )


def test_that_the_emulator_alone_is_better_or_not_told_apart_is_said_to_be_no_protection() -> None:
    assert words(score(68, 0.43))[-1].startswith(
        "No protection for the owner: the tuned emulator alone is better than the plugged-in model: accuracy -7.5 "
    )
    assert words(TUNED)[-1].startswith(
        "1,000 rows do not tell the plugged-in model from the tuned emulator alone: "
        "no protection for the owner shows: accuracy +0.0 points ["
    )


@pytest.mark.parametrize("plugged", [score(82, 0.5), score(82, 0.42), score(75.5, 0.3)])
def test_protection_in_one_measure_only_is_no_more_than_that(plugged: Score) -> None:
    assert words(plugged)[-1].startswith(
        "The owner's protection is in one measure only, the plugged-in model against the tuned emulator alone: "
    )


def test_nothing_is_said_of_what_has_no_score() -> None:
    assert in_words(table(alone())) == ()
    assert len(in_words(table(alone(), evaluated(PLUGGED)))) == 1
