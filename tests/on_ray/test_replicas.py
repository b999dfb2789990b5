"""Sessions are spread over replicas and stay where they are; more replicas come when requests wait."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.harness import ENVIRONMENT

WITHIN_S = 280  # Ray starts slowly where the machine has other work


def found(model: Path, what: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.on_ray.spread", str(model), what]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=WITHIN_S)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("FOUND "))


def test_sessions_are_spread_over_the_replicas_and_each_stays_with_its_own(tiny_models: dict[str, Path]) -> None:
    said = found(tiny_models["llama"], "sticky")
    assert said["again"] == said["first"]
    assert len({tuple(stages) for stages in said["first"].values()}) == 2
    assert all(len(set(stages)) == 2 for stages in said["first"].values()), "two stages, each in its own process"
    assert said["load"]["replicas"] == 2
    assert [place for place, _ in said["load"]["stages"]] == [0, 0, 1, 1]
    assert sum(load["weight_bytes"] for _, load in said["load"]["stages"]) == said["load"]["weight_bytes"] > 0
    assert sum(said["load"]["batches"].values()) == 2 * 6 * 6, "every pass of every stage is told of"


def test_a_replica_is_added_while_requests_wait_and_new_sessions_go_there(tiny_models: dict[str, Path]) -> None:
    said = found(tiny_models["llama"], "scale")
    assert (said["before"], said["during"]) == (1, 2)
    assert said["stayed"] == said["old"], "a session stays with its replica while that lives"
    assert any(stages != said["old"] for stages in said["others"])
