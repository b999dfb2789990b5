"""The examples run as they stand, over TLS, and what they save loads into the whole model."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest

from tests.harness import ENVIRONMENT, Server, run_command, serving
from tests.parity.reference import whole_model

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted({path.stem for path in (ROOT / "examples").glob("*.py")} - {"pictures"})  # of text


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    place = tmp_path_factory.mktemp("authority") / "certs"
    for arguments in (["init"], ["issue", "--name", "alice"]):
        done = run_command("cloud_node", "certs", *arguments, "--dir", place, cache=cache)
        assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def node(tiny_models: dict[str, Path], certs: Path, cache: Path) -> Iterator[Server]:
    with serving(tiny_models["llama"], "--cut", "1:1", "--certs", str(certs / "server"), cache=cache) as server:
        yield server


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(
    name: str, node: Server, certs: Path, cache: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    out = [] if name == "generate" else [str(tmp_path / "adapter")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), node.address, *out, str(certs / "alice")],
        env={**ENVIRONMENT, "ISTHMUS_CACHE": str(cache)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if out:
        peft.PeftModel.from_pretrained(whole_model(tiny_models["llama"]), out[0])
