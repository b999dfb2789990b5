"""Whoever lists methods lists all of them: settings, the planner's tables and the report (docs/architecture.md)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest

from edge_client.config import TrainConfig
from edge_client.plan_candidates import KINDS
from edge_client.plan_settings import TAKEN, PlanSettings
from edge_client.plan_ways import WAYS, name_of
from isthmus.report.schema import RunReport

METHODS = set(get_args(TrainConfig.model_fields["method"].annotation))
EXCHANGES = {one for part in get_args(TrainConfig.model_fields["exchange"].annotation) for one in get_args(part)}
REFERENCE = "local"
"""What others are compared with, and nothing that is looked for within limits."""

ASKED = PlanSettings.read(None, {"model": "gpt2"})


def exchanges(configs: Iterable[TrainConfig]) -> set[Any]:
    return {config.exchange for config in configs} - {None}


def test_every_list_of_methods_has_all_of_them() -> None:
    assert set(get_args(RunReport.model_fields["method"].annotation)) == METHODS
    assert set(TAKEN) == METHODS
    assert {way.chosen["method"] for way in WAYS} == METHODS
    assert {kind["method"] for kind in KINDS} == METHODS - {REFERENCE}


def test_every_exchange_has_a_row_and_is_looked_for_within_limits() -> None:
    assert EXCHANGES
    assert exchanges(way.configured(ASKED) for way in WAYS) == EXCHANGES
    assert exchanges(ASKED.configured(kind) for kind in KINDS) == EXCHANGES


@pytest.mark.parametrize(
    "configs",
    [[way.configured(ASKED) for way in WAYS], [ASKED.configured(kind) for kind in KINDS]],
    ids=["rows of the table", "looked for"],
)
def test_no_two_are_called_alike(configs: list[TrainConfig]) -> None:
    assert len({name_of(config) for config in configs}) == len(configs)


def test_the_page_names_every_list_by_its_file() -> None:
    page = Path("docs/architecture.md").read_text()
    for name, module in (("TAKEN", TAKEN), ("KINDS", KINDS), ("WAYS", WAYS)):
        (line,) = [one for one in page.split(";") if f"`{name}` in" in one]
        file = line.split(f"`{name}` in")[1].split("`")[1]
        assert module, name
        assert f"{name}: Final" in Path(file).read_text()
