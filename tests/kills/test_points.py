"""Whichever process dies at whichever point: the run goes on, and learns the same, each step once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_client.runs import RunDirectory
from isthmus.errors import UsageError
from isthmus.faults import VARIABLE, Fault, arm
from isthmus.report.schema import RunReport
from tests.faults.training import run_here
from tests.kills.cases import CACHE, EDGE, SERVER, armed, pairs
from tests.kills.disturbed import Place, check_whole
from tests.kills.forked import KILLED, Forked


@pytest.mark.parametrize(("method", "fault"), pairs(SERVER))
def test_a_server_that_dies_there_and_comes_back_changes_nothing(
    place: Place, undisturbed: Callable[..., Path], tmp_path: Path, method: str, fault: str
) -> None:
    expected = undisturbed(method)
    server = place.serve(fault=armed(fault, method))
    with place.reborn(server) as others:
        report = run_here(place.settings(method, server.address, tmp_path), tmp_path / "run")
    assert server.code == KILLED
    assert len(others) == 1
    check_whole(tmp_path / "run", expected)
    assert report.agreement is not None
    assert report.agreement.equal
    assert report.agreement.unchecked_streams == 1


@pytest.mark.parametrize(("method", "fault"), pairs((*EDGE, *CACHE)))
def test_an_edge_that_dies_there_and_resumes_changes_nothing(
    place: Place, steady: Forked, undisturbed: Callable[..., Path], tmp_path: Path, method: str, fault: str
) -> None:
    expected, out = undisturbed(method), tmp_path / "run"
    edge = place.train(place.settings(method, steady.address, tmp_path), out, armed(fault, method))
    assert edge.wait() == KILLED, edge.said
    assert VARIABLE in edge.said
    assert not (out / "run.json").exists()
    run_here(RunDirectory(out).config(), out, resume=True)
    check_whole(out, expected)
    assert not list(out.rglob("*.tmp")), "something of the killed process is left"


def test_an_edge_that_dies_while_it_fetches_goes_on_there(
    place: Place, steady: Forked, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    expected, out, fetched = undisturbed("split"), tmp_path / "run", str(tmp_path / "fetched")
    fault = f"{Fault.FETCH_HALF_ARRIVED}:3"  # of its files
    edge = place.train(place.settings("split", steady.address, tmp_path), out, fault, ISTHMUS_CACHE=fetched)
    assert edge.wait() == KILLED, edge.said
    again = place.resume(out, ISTHMUS_CACHE=fetched)
    assert again.wait() == 0, again.said
    check_whole(out, expected)
    ends = sum(path.stat().st_size for path in Path(fetched).glob("bundles/*/*"))
    assert RunReport.load(out).cost.wire.by_phase.fetch.down_bytes < ends / 10  # what had come was not sent again


def test_a_point_that_does_not_exist_is_refused_at_the_start(place: Place) -> None:
    for given in ("none-such", "server-in-forward:0", "server-in-forward:x"):
        refused = place.forking.start("edge_client", "report", "run", fault=given)
        assert refused.wait() == UsageError.exit_code
        assert len(refused.said.splitlines()) == 1
        assert VARIABLE in refused.said


def test_nothing_is_armed_without_the_variable() -> None:
    assert arm({}) is None
    assert arm({VARIABLE: ""}) is None
