"""The README's commands, run as they stand; only the model is a tiny one and the port a free one."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ENVIRONMENT, save_tiny_model, write_rows

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TARGETS = re.findall(r"^make (\w+)", README, re.MULTILINE)
BIN = Path(sys.executable).parent


def commands(name: str) -> list[list[str]]:
    """The README's indented-block commands that begin with `name`, comments off and continued lines joined."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in blocks.splitlines() if line.startswith(f"{name} ")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(TARGETS)
    for target in TARGETS:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_that_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.timeout(240)
def test_a_first_run_of_ones_own_works_as_the_readme_tells_it(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "models" / "smollm2-135m", "llama")
    write_rows(tmp_path / "train.jsonl")
    write_rows(tmp_path / "held-out.jsonl", seed=1)
    address = f"localhost:{free_port()}"
    environment = {**ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}", "ISTHMUS_CACHE": str(tmp_path / "cache")}

    def run(words: list[str]) -> str:
        words = [address if word == "localhost:7070" else word for word in words]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    owner = [words for words in commands("cloud_node") if words[1] != "models"]
    serve = owner.pop()
    assert serve[1] == "serve"
    for words in owner:
        run(words)
    serving = [address if word == "localhost:7070" else word for word in serve]
    with subprocess.Popen(serving, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            assert any(line.startswith("cloud_node: ready") for line in server.stdout)
            outputs = [run(words) for words in commands("edge_client")]
        finally:
            server.terminate()
            server.stdout.read()
    assert server.returncode == 0
    assert len(outputs) == 7
    for run_name in ("first", "top", "dlora"):
        assert (tmp_path / "runs" / run_name / "adapter/adapter_model.safetensors").is_file()
    assert "The two sides' counts" in (tmp_path / "costs.md").read_text()
