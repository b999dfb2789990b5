"""The kernel agrees with the ledger: for each method, an interface counts the ledger's bytes and the framing's."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.truth.framing import SEGMENT_BYTES, Crossing
from tests.truth.namespaces import missing
from tests.truth.runs import CASES, Case, Crossed, Site, site

SHARE = 0.02
LEAST_BYTES = 20_000_000
WAYS = ("up", "down", "both")

Measure = Callable[[Case], Crossed]


@pytest.fixture(scope="module")
def between(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A node and an edge in namespaces of their own."""
    why = missing()
    if why is not None:
        pytest.skip(why)
    with site(tmp_path_factory.mktemp("truth")) as ready:
        yield ready


@pytest.fixture(scope="module")
def measured(between: Site) -> Measure:
    """What a case moved; each is carried out once."""
    return cache(between.run)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_interfaces_count_what_the_ledger_has_and_its_framing(measured: Measure, case: Case) -> None:
    crossed = measured(case)
    assert crossed.both.ledger - crossed.fetched >= LEAST_BYTES
    for way in WAYS:
        found: Crossing = getattr(crossed, way)
        assert abs(found.difference) < SHARE, f"{way}: {found}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_framing_is_a_small_part_of_what_crosses(measured: Measure, case: Case) -> None:
    both = measured(case).both
    assert 0 < both.http2 + both.tls < 0.01 * both.ledger
    assert both.packets > both.ledger // SEGMENT_BYTES  # no packet stood for several segments
