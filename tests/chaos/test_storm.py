"""A storm of 30 s changes nothing that is learnt, and the model that judges its history finds what is wrong."""

from pathlib import Path

import pytest

from tests.chaos.history import Began, Died, Ended, Event, NotAllowedError, Stepped, judge
from tests.chaos.run import undisturbed, weathered
from tests.kills.conftest import forking, place  # noqa: F401 (fixtures)
from tests.kills.disturbed import Place

SECONDS, SEED = 30.0, 4


@pytest.mark.timeout(300)
def test_a_storm_changes_nothing(place: Place, tmp_path: Path) -> None:  # noqa: F811
    expected = undisturbed(place, "kill-and-revive", tmp_path / "fair" / "run")
    (tmp_path / "storm").mkdir()
    weathered(place, "kill-and-revive", expected, tmp_path / "storm" / "run", SEED, SECONDS)


GOOD: list[Event] = [
    *(Began(0), Stepped(1), Stepped(2), Stepped(3), Died(2)),
    *(Began(2), Stepped(3), Died(2)),
    *(Began(2), Stepped(3), Stepped(4), Ended(0)),
]


def test_the_model_allows_a_run_that_goes_on_from_its_checkpoint() -> None:
    assert judge(GOOD, 4, 2) == 3


@pytest.mark.parametrize(
    "bad",
    [
        [Began(0), Stepped(1), Stepped(1)],
        [Began(0), Stepped(2)],
        [Began(0), Stepped(1), Stepped(2), Died(2), Began(0)],
        [Began(0), Stepped(1), Stepped(2), Died(2), Began(2), Died(0)],
        [Began(0), Stepped(1), Died(2)],
        [Began(0), Stepped(1), Stepped(2), Stepped(3), Died(0)],
        [Began(0), Began(0)],
        [Began(0), Stepped(1), Ended(0)],
        [Began(0), Stepped(1), Stepped(2), Stepped(3), Stepped(4), Ended(1)],
        GOOD[:-1],
        [],
    ],
    ids=str,
)
def test_the_model_allows_nothing_else(bad: list[Event]) -> None:
    with pytest.raises(NotAllowedError):
        judge(bad, 4, 2)
