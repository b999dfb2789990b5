"""A command that computes nothing starts without the libraries that compute: they take seconds to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ENVIRONMENT
from tests.report.by_hand import write_run
from tests.report.example import report

ROOT = Path(__file__).parents[2]

PROGRAM = """
import atexit, pathlib, runpy, sys
atexit.register(lambda: pathlib.Path("loaded").write_text("\\n".join(sys.modules)))
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

HEAVY = {"torch", "transformers", "peft", "accelerate", "ray", "plotly", "tensorboard", "pandas", "scipy"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a run in it, and nothing else."""
    write_run(tmp_path / "run", report())
    return tmp_path


def heavy_after(command: str, place: Path, code: int) -> set[str]:
    """The libraries that a command, run in `place`, has imported when it ends with `code`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command.split()],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout or done.stderr
    return {name.partition(".")[0] for name in (place / "loaded").read_text().split()} & HEAVY


@pytest.mark.parametrize(
    "command",
    [
        "cloud_node --help",
        "cloud_node certs --help",
        "cloud_node policy check --help",
        "cloud_node certs init --dir certs",
        "cloud_node models fetch --help",
        "cloud_node serve --help",
        "cloud_node emulator build --help",
        "cloud_node plug-in --help",
        "edge_client --help",
        "edge_client train --help",
        "edge_client report --help",
        "edge_client plan --help",
        "edge_client report run --format table",
        "edge_client report run --format json",
    ],
)
def test_what_computes_nothing_imports_nothing_that_computes(command: str, place: Path) -> None:
    assert not heavy_after(command, place, 0)


@pytest.mark.parametrize(
    "command",
    [
        "cloud_node serve --none-such",
        "cloud_node serve --model tiny --listen 0.0.0.0:7070",
        "cloud_node serve --model tiny --cut 2",
        "cloud_node serve --model tiny --policy none.yaml",
        "cloud_node emulator build --model tiny --out out --keep half",
        "cloud_node plug-in --model tiny --adapter adapter --out out --emulator emulator",
        "edge_client train --none-such",
        "edge_client train --out out --method split --data rows.jsonl",
        "edge_client train --out out --method split --data rows.jsonl --server 127.0.0.1:7070 --kr-active 0.5",
        "edge_client report run --format pdf",
        "edge_client plan --model gpt2 --fit",
        "edge_client plan --model gpt2 --method split --kr-active 0.5",
        "edge_client chat --run run --top-p 0.5",
    ],
)
def test_a_mistaken_command_line_is_refused_before_they_are_imported(command: str, place: Path) -> None:
    assert not heavy_after(command, place, 2)


def test_what_computes_does_import_them(place: Path) -> None:
    assert {"torch", "transformers"} <= heavy_after("cloud_node serve --model none-such/", place, 4)
