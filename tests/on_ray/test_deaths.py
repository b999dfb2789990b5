"""Whatever of a node on Ray dies, a run that it serves goes on by itself and learns the same, bit for bit."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Adapter, undisturbed, undisturbed_run
from tests.faults.mortal import Mortal, mortal_server
from tests.faults.training import Background, adapter, kill, same_bits, settings, wait_until
from tests.harness import Server, serving
from tests.on_ray.processes import HEAD, REPLICA, STAGE, end_one, kinds
from tests.watching.reading import StatusPort

__all__ = ["undisturbed", "undisturbed_run"]

FLAGS = ("--cut", "1:1", "--engine", "ray", "--stages", "3", "--replicas", "2:2", "--status-port", "0")
PATIENCE_S = 240.0


@pytest.fixture(scope="session")
def servers(tiny_models: dict[str, Path], cache: Path) -> Iterator[dict[str, Server]]:
    """What undisturbed runs are made on: a node without Ray."""
    with serving(tiny_models["llama"], "--cut", "1:1", cache=cache) as server:
        yield {"llama": server}


@pytest.fixture(scope="module")
def mortal(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortal]:
    with mortal_server(tiny_models["llama"], tmp_path_factory.mktemp("mortal"), *FLAGS) as mortal:
        yield mortal


def survives(
    mortal: Mortal,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: Path,
    end: Callable[[Server], None],
    **changes: Any,
) -> Adapter:
    """The adapter of a run in the middle of which something ends."""
    server = mortal.running()
    run = Background(settings(server, rows, patience=PATIENCE_S, **changes), out, monkeypatch)
    run.reaches(5)
    end(server)
    run.must_go_on()
    try:
        report = run.result(PATIENCE_S)
    except BaseException as error:
        raise AssertionError(f"the node said: {mortal.server.log[-3000:]}") from error
    assert report.status == "complete"
    return adapter(out)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_that_is_killed_begins_anew_and_nothing_changes(
    mortal: Mortal,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Adapter],
    stage: int,
) -> None:
    expected, restarts = undisturbed(microbatches=2), begun_anew(mortal)

    def end(server: Server) -> None:
        before = kinds(server, STAGE)
        for replica in range(2):
            end_one(server, STAGE, stage if replica == 0 else stage + 2)
        wait_until(lambda: len(set(kinds(server, STAGE)) - set(before)) == 2, "two stages in place of those")

    found = survives(mortal, tmp_path / "run", monkeypatch, rows, end, microbatches=2)
    assert same_bits(found, expected)
    wait_until(lambda: begun_anew(mortal) > restarts, "the status page to tell of it")


def begun_anew(mortal: Mortal) -> int:
    """Stages, as the status page has it."""
    return int(load(mortal)["restarts"])


def load(mortal: Mortal) -> dict[str, Any]:
    """What the status page says of the engine; not asked more often than it looks."""
    time.sleep(0.2)
    figures: dict[str, Any] = StatusPort.of(mortal.running()).figures()["load"]
    return figures


def test_a_stage_that_does_not_answer_is_missing_and_its_replica_does_not_count(mortal: Mortal) -> None:
    wait_until(lambda: len(load(mortal)["stages"]) == 6, "all stages of both replicas to be known")
    stopped = kinds(mortal.server, STAGE)[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        wait_until(lambda: load(mortal)["missing"] == 1, "the stage to be missed")
        assert (load(mortal)["replicas"], len(load(mortal)["stages"])) == (1, 5)
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: load(mortal)["replicas"] == 2, "the stage to answer again")


def test_a_replica_that_is_killed_is_replaced_and_its_sessions_go_to_another(
    mortal: Mortal, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Adapter]
) -> None:
    expected = undisturbed(microbatches=2)

    def end(server: Server) -> None:
        for pid_of in range(2):  # whichever of them the session is at
            wait_until(lambda: len(kinds(server, REPLICA)) >= 1, "a replica")
            end_one(server, REPLICA, min(pid_of, len(kinds(server, REPLICA)) - 1))

    assert same_bits(survives(mortal, tmp_path / "run", monkeypatch, rows, end, microbatches=2), expected)


def test_with_adapters_inside_the_span_a_killed_stage_changes_nothing_either(
    mortal: Mortal, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Adapter]
) -> None:
    given = {"method": "dlora", "targets": ["q_proj", "v_proj"], "microbatches": 2, "steps": 16}
    expected = undisturbed(**given)
    found = survives(mortal, tmp_path / "run", monkeypatch, rows, lambda server: end_one(server, STAGE, 1), **given)
    assert same_bits(found, expected)


def test_a_node_whose_head_is_killed_begins_anew_on_its_port_and_nothing_changes(
    mortal: Mortal, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Adapter]
) -> None:
    expected = undisturbed(microbatches=2)

    def end(server: Server) -> None:
        end_one(server, HEAD)
        wait_until(lambda: "beginning anew" in server.log, "the node to miss its head")

    slow = "500:100:100"  # so that it takes longer than a head is missed
    found = survives(mortal, tmp_path / "run", monkeypatch, rows, end, microbatches=2, link=slow)
    assert same_bits(found, expected)
    assert mortal.server.log.count("cloud_node: ready on") == 2
    assert mortal.server.process.poll() is None


def test_a_node_that_is_killed_and_started_again_changes_nothing_and_leaves_nothing_behind(
    mortal: Mortal, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Adapter]
) -> None:
    expected = undisturbed(microbatches=2)

    def end(server: Server) -> None:
        started = [pid for kind in (STAGE, REPLICA, HEAD) for pid in kinds(server, kind)]
        kill(server)
        wait_until(lambda: not any(is_there(pid) for pid in started), "what it had started to end")
        mortal.restart()

    assert same_bits(survives(mortal, tmp_path / "run", monkeypatch, rows, end, microbatches=2), expected)


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
