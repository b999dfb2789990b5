"""One score is called better than another only where a paired interval of the same rows lies above nothing."""

import pytest

from isthmus.report.evaluated import PerRow
from isthmus.report.interval import paired, ratio_interval
from isthmus.report.verdict import FEWEST_ROWS, Interval, Rises, Verdict, verdict


def rows(*nats: float, correct: tuple[bool, ...] = ()) -> PerRow:
    return PerRow(nats=nats, tokens=tuple(range(1, len(nats) + 1)), correct=correct)


LEVEL = rows(*[float(place) for place in range(30)], correct=(True, False) * 15)
LOWER = rows(*[place - 0.5 - place / 100 for place in range(30)], correct=(True,) * 30)


@pytest.mark.parametrize(
    ("gain", "found"),
    [
        ((0.2, 0.1, 0.3), "better"),
        ((-0.2, -0.3, -0.1), "worse"),
        ((0.2, -0.1, 0.5), "undecided"),
        ((0.2, 0.0, 0.4), "undecided"),
        ((0.0, 0.0, 0.0), "undecided"),
        ((1e-6, 1e-6, 1e-6), "undecided"),
        ((-1e-6, -1e-6, -1e-6), "undecided"),
        (None, "undecided"),
    ],
)
def test_only_an_interval_on_one_side_of_nothing_decides(gain: Interval | None, found: Verdict) -> None:
    assert verdict(gain) == found


def test_accuracy_that_rises_and_loss_that_falls_are_better_and_the_other_way_round_worse() -> None:
    rises = Rises.between(LEVEL, LOWER)
    assert rises.accuracy == paired(LEVEL.correct, LOWER.correct)
    assert rises.loss == ratio_interval([-0.5 - place / 100 for place in range(30)], LEVEL.tokens)
    assert rises.rows == 30
    assert rises.verdicts == {"accuracy": "better", "loss": "better"}
    assert Rises.between(LOWER, LEVEL).verdicts == {"accuracy": "worse", "loss": "worse"}
    assert Rises.between(LEVEL, LEVEL).verdicts == {"accuracy": "undecided", "loss": "undecided"}


def test_rows_without_choices_have_a_verdict_on_loss_alone() -> None:
    plain = rows(*LEVEL.nats)
    assert Rises.between(plain, rows(*LOWER.nats)).verdicts == {"loss": "better"}
    assert Rises.between(plain, plain).accuracy is None


def test_a_few_rows_do_not_tell_of_loss() -> None:
    for count, found in ((1, "undecided"), (FEWEST_ROWS - 1, "undecided"), (FEWEST_ROWS, "better")):
        few = Rises.between(rows(*LEVEL.nats[:count]), rows(*LOWER.nats[:count]))
        assert few.verdicts == {"loss": found}
        assert (few.loss is None) == (found == "undecided")


@pytest.mark.parametrize(
    "changed", [{"tokens": (9, *LEVEL.tokens[1:])}, {"correct": LEVEL.correct[1:]}, {"nats": (), "tokens": ()}]
)
def test_scores_of_other_rows_or_of_other_tokens_of_them_are_refused(changed: dict[str, tuple[int, ...]]) -> None:
    other = LEVEL.model_copy(update=changed)
    for pair in ((LEVEL, other), (other, LEVEL)):
        with pytest.raises(ValueError, match="are not the same rows and tokens"):
            Rises.between(*pair)
