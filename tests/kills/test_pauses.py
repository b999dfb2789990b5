"""A server that stands still for a while: the run waits, goes on, and nothing happens twice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_client.config import TrainConfig
from tests.faults.training import Background, wait_until
from tests.kills.cases import EVERYTHING
from tests.kills.disturbed import Place, check_whole

STEPS = 40
STANDS_STILL_S = 4.0
"""Longer than a keepalive's patience would be if it were set too short; nothing is measured with it."""


@pytest.mark.parametrize("microbatches", [1, 4] if EVERYTHING else [4])
def test_a_paused_server_delays_a_run_and_changes_nothing(
    place: Place,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    microbatches: int,
) -> None:
    expected = undisturbed("split", steps=STEPS, microbatches=microbatches)
    server = place.serve()
    config: TrainConfig = place.settings("split", server.address, tmp_path, steps=STEPS, microbatches=microbatches)
    run = Background(config, tmp_path / "run", monkeypatch)
    run.reaches(3)
    with server.paused():
        wait_until(lambda: run.in_flight == microbatches, "the step's requests to be under way")
        assert not server.ended.wait(STANDS_STILL_S)
        run.must_go_on()
    report = run.result()
    server.kill()
    check_whole(tmp_path / "run", expected, STEPS)
    assert report.agreement is not None
    assert report.agreement.equal
    assert report.agreement.unchecked_streams == 0  # the very same stream went on
    assert report.cost.wire.resent_bytes == 0
