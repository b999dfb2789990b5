"""Whole runs that join rounds, over real TLS, against a node that is killed and beside an edge that is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edge_client.config import TrainConfig
from edge_client.runs import RunDirectory
from isthmus.errors import UsageError
from tests.faults.training import as_flags, run_here, settings
from tests.harness import ENVIRONMENT, Server, save_tiny_model, serving, start_server, write_rows

WAIT_S = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of four edges."""
    made = tmp_path_factory.mktemp("rounds")
    save_tiny_model(made / "model", "llama")
    for seed in range(4):
        write_rows(made / f"rows-{seed}.jsonl", seed=seed)
    return made


def flags(place: Path, identities: Path) -> tuple[str, ...]:
    """Of a node that holds rounds."""
    kept = ("--rounds", str(place / "kept"), "--round-wait", str(WAIT_S))
    return ("--cut", "1:1", "--certs", str(identities / "server"), *kept)


def run_of(server: Server, place: Path, identities: Path, seed: int, steps: int, **changes: object) -> TrainConfig:
    """The settings of one edge."""
    own = {"certs": identities / f"edge-{seed}", "patience": 40, "rank": 2, "codec": "none", "steps": steps, **changes}
    return settings(server, place / f"rows-{seed}.jsonl", **own)


def adapter(out: Path) -> dict[str, torch.Tensor]:
    """The tensors that a run left."""
    return load_file(RunDirectory(out).adapter / "adapter_model.safetensors")


def test_a_round_is_the_average_of_the_runs_alone(place: Path, identities: Path, tmp_path: Path) -> None:
    """Also when the node dies just before it keeps the sum; and the ledger has what the round cost."""
    given, cache = flags(place, identities), place / "cache"
    first = start_server(place / "model", *given, cache=cache, ISTHMUS_FAULT="round-before-sum")
    port = int(first.address.rpartition(":")[2])
    for seed in range(3):
        run_here(run_of(first, place, identities, seed, 3), tmp_path / f"alone-{seed}")
    joining = [run_of(first, place, identities, seed, 3, join="one", round_every=3) for seed in range(3)]
    runs = [begun(config, tmp_path / f"joined-{seed}", place) for seed, config in enumerate(joining)]
    assert first.process.wait(180) == -9
    with serving(place / "model", *given, cache=cache, port=port):
        for run in runs:
            said, _ = run.communicate(timeout=240)
            assert run.returncode == 0, said
    alone = [adapter(tmp_path / f"alone-{seed}") for seed in range(3)]
    joined = [adapter(tmp_path / f"joined-{seed}") for seed in range(3)]
    for name, value in joined[0].items():
        assert all(torch.equal(value, other[name]) for other in joined)
        assert torch.allclose(value, torch.stack([each[name] for each in alone]).mean(0), atol=1e-6)
    assert not torch.allclose(*(torch.cat([v.flatten() for v in each.values()]) for each in alone[:2]), atol=1e-4)
    values = sum(value.numel() for value in joined[0].values())
    for seed in range(3):
        spent = RunDirectory(tmp_path / f"joined-{seed}").ledger().totals("rounds")
        assert spent["up_payload_bytes"] >= 4 * values
        assert spent["down_payload_bytes"] == 4 * values


def test_a_killed_edge_costs_only_itself_and_comes_back(place: Path, identities: Path, tmp_path: Path) -> None:
    """The others go on without it, and all four end with the same adapter."""
    with serving(place / "model", *flags(place, identities), cache=place / "cache") as server:
        configs = [run_of(server, place, identities, seed, 6, join="two", round_every=2) for seed in range(4)]
        outs = [tmp_path / f"edge-{seed}" for seed in range(4)]
        lost = begun(configs[3], outs[3], place, ISTHMUS_FAULT="round-before-submit")
        others = [begun(config, out, place) for config, out in zip(configs[:3], outs[:3], strict=True)]
        assert lost.wait(180) == -9
        again = begun(configs[3], outs[3], place, "--resume")
        for process in (*others, again):
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
            assert "round 3 of two: the average of " in said
    adapters = [adapter(out) for out in outs]
    assert all(torch.equal(value, each[name]) for each in adapters for name, value in adapters[0].items())


def begun(config: TrainConfig, out: Path, place: Path, *more: str, **environment: str) -> "subprocess.Popen[str]":
    """A process that trains."""
    given = ["--resume"] if "--resume" in more else as_flags(config)
    return subprocess.Popen(
        [sys.executable, "-m", "edge_client", "train", *given, "--out", str(out)],
        env={**ENVIRONMENT, "ISTHMUS_CACHE": str(place / "cache"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cohort": 2}, "greater than or equal to 3"),
        ({"certs": None}, "--certs"),
        ({"steps": 7}, "rounds of 3"),
        ({"steps": None, "epochs": 1}, "--steps"),
        ({"join": None}, "give --join"),
        ({"join": "../etc"}, "a name is"),
        ({"peft": "adalora"}, "--peft adalora"),
        ({"clip": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_round_are_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    """Before anything starts."""
    usual = {"method": "split", "server": "localhost:1", "certs": tmp_path, "data": tmp_path / "rows", "steps": 6}
    with pytest.raises((UsageError, ValueError), match=said):
        TrainConfig.model_validate({**usual, "join": "reviews", "round_every": 3, **changes})
