"""A node that dies and comes back charges each request once: what a whole run used of its day is the same."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_node.policy.usage import Usage
from isthmus.errors import LimitError
from isthmus.faults import Fault
from tests.faults.training import run_here
from tests.kills.cases import EVERYTHING, SERVER
from tests.kills.disturbed import Place, check_whole
from tests.kills.forked import KILLED

POINTS = (Fault.QUOTA_BEFORE_COMMIT, Fault.QUOTA_AFTER_COMMIT, *SERVER)
USUALLY = (Fault.QUOTA_BEFORE_COMMIT, Fault.QUOTA_AFTER_COMMIT, Fault.SERVER_AFTER_REPLY)


def policy(folder: Path, tokens: int) -> Path:
    """Lets everybody train, so many tokens a day."""
    every = "models: ['*'], methods: ['*'], exchanges: ['*'], cuts: ['*']"
    file = folder / "policy.yaml"
    file.write_text(f"default: {{{every}, limits: {{tokens_per_day: {tokens}}}}}\n")
    return file


def used(file: Path) -> int:
    """Tokens of today."""
    record = Usage(Path(f"{file}.usage"))
    try:
        return record.used("anonymous")
    finally:
        record.close()


@pytest.fixture(scope="module")
def whole_run(place: Place, tmp_path_factory: pytest.TempPathFactory) -> int:
    """What a run uses that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    file = policy(folder, 1_000_000)
    server = place.serve("--policy", file)
    run_here(place.settings("split", server.address, folder), folder / "run")
    server.kill()
    return used(file)


@pytest.mark.parametrize("fault", POINTS if EVERYTHING else USUALLY)
def test_a_node_that_dies_charges_each_request_once(
    place: Place, undisturbed: Callable[..., Path], whole_run: int, tmp_path: Path, fault: Fault
) -> None:
    expected, file = undisturbed("split"), policy(tmp_path, 1_000_000)
    server = place.serve("--policy", file, fault=f"{fault}:3")
    with place.reborn(server, "--policy", file) as others:
        run_here(place.settings("split", server.address, tmp_path), tmp_path / "run")
    assert server.code == KILLED
    assert len(others) == 1
    check_whole(tmp_path / "run", expected)
    assert used(file) == whole_run > 0


def test_a_day_that_is_used_up_stays_so_when_the_node_is_started_again(
    place: Place, whole_run: int, tmp_path: Path
) -> None:
    file = policy(tmp_path, whole_run)
    for again in range(2):
        server = place.serve("--policy", file)
        config = place.settings("split", server.address, tmp_path, patience=1.0, seed=again)
        if again:
            with pytest.raises(LimitError, match="midnight UTC"):
                run_here(config, tmp_path / f"run-{again}")
        else:
            run_here(config, tmp_path / f"run-{again}")
        server.kill()
    assert used(file) == whole_run
