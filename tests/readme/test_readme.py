"""Commands of the README and of a page of the docs, as they stand; only the model is a tiny one and the port free."""

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
OFFSITE = (ROOT / "docs/offsite.md").read_text()
TARGETS = re.findall(r"^make (\w+)", README, re.MULTILINE)
BIN = Path(sys.executable).parent


def commands(page: str, name: str) -> list[list[str]]:
    """A page's commands that begin with `name`, comments off and continued lines joined."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
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


def carry_out(page: str, place: Path) -> list[str]:
    """Run a page's commands: the owner's, then, while its node serves, the edge's; returns what those print."""
    save_tiny_model(place / "models" / "smollm2-135m", "llama")
    write_rows(place / "train.jsonl")
    write_rows(place / "held-out.jsonl", seed=1)
    (place / "public.txt").write_text("The river that the old bridge crosses is slow. " * 40)
    address = f"localhost:{free_port()}"
    environment = {**ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}", "ISTHMUS_CACHE": str(place / "cache")}

    def run(words: list[str]) -> str:
        words = [address if word == "localhost:7070" else word for word in words]
        done = subprocess.run(
            words, cwd=place, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    owner = commands(page, "cloud_node")
    (serve,) = [words for words in owner if words[1] == "serve"]
    for words in owner:
        if words[1] not in ("models", "serve"):
            run(words)
    serving = [address if word == "localhost:7070" else word for word in serve]
    with subprocess.Popen(serving, cwd=place, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            assert any(line.startswith("cloud_node: ready") for line in server.stdout)
            outputs = [run(words) for words in commands(page, "edge_client")]
        finally:
            server.terminate()
            server.stdout.read()
    assert server.returncode == 0
    return outputs


@pytest.mark.timeout(400)
def test_a_first_run_of_ones_own_works_as_the_readme_tells_it(tmp_path: Path) -> None:
    assert len(carry_out(README, tmp_path)) == 12
    for run_name in ("first", "top", "dlora", "offsite"):
        assert (tmp_path / "runs" / run_name / "adapter/adapter_model.safetensors").is_file()
    assert "The two sides' counts" in (tmp_path / "costs.md").read_text()


@pytest.mark.timeout(240)
def test_tuning_offsite_works_as_its_page_tells_it(tmp_path: Path) -> None:
    certificates = "```sh\ncloud_node certs init\ncloud_node certs issue --name alice\n```\n"
    emulators, *_, report, _, _ = carry_out(certificates + OFFSITE, tmp_path)
    assert "rank-0.75" in emulators
    assert "plugged in" in report
