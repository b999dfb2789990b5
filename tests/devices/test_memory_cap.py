"""An edge trains with a model that it could not hold, under a cap that the kernel enforces.

The cap is RLIMIT_DATA (setrlimit(2)): private writable memory, mapped or from the heap, whoever asks for it. It needs
no rights and no cgroup, so the test holds wherever Linux runs.
"""

import json
import resource
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from isthmus.load import load_config
from tests.devices import deep_model
from tests.harness import ENVIRONMENT, Server, write_rows

CAP = 768 << 20
STEPS = 2


def train(python: Path, out: Path, cache: Path, *flags: object) -> "subprocess.CompletedProcess[str]":
    """`edge_client train` of the edge's install, in a process under the cap."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    data = write_rows(out.parent / "rows.jsonl")
    shared = ["--data", data, "--steps", STEPS, "--batch-size", 2, "--threads", 1, "--out", out]
    return subprocess.run(
        [python, "-m", "edge_client", "train", *map(str, (*shared, *flags))],
        cwd=out.parent,
        env={**environment, "ISTHMUS_CACHE": str(cache)},
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_DATA, (CAP, CAP)),
        capture_output=True,
        text=True,
        timeout=120,
    )


def stored_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def test_an_edge_trains_under_a_cap_below_the_weights_of_the_model(
    edge_python: Path,
    deep: Path,
    deep_server: Server,
    cache: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    assert stored_bytes(deep) > CAP
    done = train(edge_python, tmp_path / "run", cache, "--method", "split", "--server", deep_server.address)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["steps"] == STEPS
    assert run["cost"]["cloud"]["backward_flops"] > 0
    high_water = run["cost"]["edge"]["peak_memory_bytes"]
    record_property("VmHWM", high_water)
    assert high_water < CAP < stored_bytes(deep)
    assert run["cost"]["cloud"]["peak_tensor_bytes"] > 2 * CAP  # in float32, as both sides computed


def test_under_the_same_cap_the_whole_model_does_not_load(
    edge_python: Path, deep: Path, cache: Path, tmp_path: Path
) -> None:
    assert load_config(deep).num_hidden_layers == deep_model.BLOCKS
    done = train(edge_python, tmp_path / "run", cache, "--method", "local", "--model", deep, "--cut", "1:1")
    assert done.returncode != 0
    assert "takes more memory than is left here" in done.stderr


def test_under_the_same_cap_a_model_with_few_of_those_blocks_trains_whole(
    edge_python: Path, cache: Path, tmp_path: Path
) -> None:
    shallow = tmp_path / "shallow"
    deep_model.save(shallow, blocks=2)
    done = train(edge_python, tmp_path / "run", cache, "--method", "local", "--model", shallow, "--cut", "0:1")
    assert done.returncode == 0, done.stderr
