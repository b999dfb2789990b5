"""What holds copying back must not hold training back: hard runs of tiny models under a policy with all its bounds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_client.config import TrainConfig
from isthmus.errors import LimitError
from tests.conftest import FAMILIES
from tests.faults.training import run_here, settings
from tests.harness import Server, serving, write_rows
from tests.policy.conftest import Nodes
from tests.watching.reading import StatusPort

COPYING = ("hidden_range", "gradients_per_input")

POLICY = """
default:
  models: ["*"]
  methods: ["*"]
  exchanges: ["*"]
  cuts: ["*"]
"""

RUNS = {
    "weights of the bottom, fast": {"cut": "2:0", "peft": "full", "lr": 0.05, "steps": 12},
    "prompts, faster": {"cut": "0:2", "peft": "prompt", "lr": 1.0, "steps": 12},
    "ends of both sides": {"cut": "1:1", "peft": "lora", "lr": 0.1, "steps": 12},
}


@pytest.fixture(scope="module", params=FAMILIES)
def bounded(
    request: pytest.FixtureRequest, tiny_models: dict[str, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A node in plaintext whose policy lets everybody train, within the bounds that it has without being told."""
    file = tmp_path_factory.mktemp("bounded") / "policy.yaml"
    file.write_text(POLICY)
    cuts = ("--cut", "0:2", "--cut", "1:1", "--cut", "2:0")
    model = tiny_models[request.param]
    with serving(model, *cuts, "--policy", str(file), "--status-port", "0", cache=cache) as server:
        yield server


def refusals(server: Server) -> float:
    series = StatusPort.of(server).series()
    return sum(series["isthmus_policy_refusals_total", frozenset({("reason", why)})] for why in COPYING)


@pytest.mark.parametrize("run", RUNS)
def test_training_by_rates_that_nobody_would_choose_is_never_refused(
    run: str, bounded: Server, rows: Path, tmp_path: Path
) -> None:
    report = run_here(settings(bounded, rows, **RUNS[run]), tmp_path / "run")
    assert report.steps == RUNS[run]["steps"]
    assert refusals(bounded) == 0


def test_hundreds_of_epochs_whose_input_never_changes_are_never_refused(nodes: Nodes, tmp_path: Path) -> None:
    """Ports in the span and nothing below them that trains: each row's hidden states come again in every epoch."""
    data = write_rows(tmp_path / "rows.jsonl", count=2)
    report = run_here(repeating(nodes, data, "usual", steps=200), tmp_path / "run")
    assert report.epochs == 200
    assert refusals(nodes.guarded) == 0


def test_the_same_run_is_refused_where_the_policy_grants_fewer(nodes: Nodes, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", count=2)
    with pytest.raises(LimitError, match="was given 3 gradients"):
        run_here(repeating(nodes, data, "thrice", steps=5), tmp_path / "run")


def repeating(nodes: Nodes, data: Path, role: str, steps: int) -> TrainConfig:
    """Training in the span alone, an epoch a step."""
    kept = {"batch_size": 2, "checkpoint_every": steps, "certs": nodes.owner / role}
    return settings(nodes.guarded, data, cut="0:2", method="dlora", rank=2, targets=["q_proj"], steps=steps, **kept)
