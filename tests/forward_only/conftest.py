"""What these tests share: servers that offer their cuts, and finished runs that several look at."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import FAMILIES
from tests.forward_only.edges import Finished, carry_out
from tests.harness import Server, serving, write_rows

OFFERED = ("0:2", "1:2", "2:1", "2:0", "0:0", "1:1")
ROWS, EVAL_ROWS = 24, 8


@pytest.fixture(scope="package")
def nodes(tiny_models: dict[str, Path], cache: Path) -> Iterator[dict[str, Server]]:
    """A plaintext loopback server process per family; tests must not stop it."""
    flags = [flag for cut in OFFERED for flag in ("--cut", cut)]
    with (
        serving(tiny_models["llama"], *flags, cache=cache) as llama,
        serving(tiny_models["gpt2"], *flags, cache=cache) as gpt2,
    ):
        nodes = {"llama": llama, "gpt2": gpt2}
        yield nodes
        for family in FAMILIES:
            assert nodes[family].process.poll() is None, nodes[family].log
            assert "Traceback" not in nodes[family].log, nodes[family].log


@pytest.fixture(scope="package")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows to score, of which training has seen none."""
    return write_rows(tmp_path_factory.mktemp("held-out") / "rows.jsonl", EVAL_ROWS, seed=5)


@pytest.fixture(scope="package")
def finished(
    nodes: dict[str, Server], rows: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Finished]:
    """A run of three epochs by the command line, for each way to train above the span; made once."""
    made: dict[str, Finished] = {}

    def run(way: str) -> Finished:
        if way not in made:
            given = {"epochs": 3, "eval_data": held_out}
            made[way] = carry_out(way, nodes["llama"].address, rows, tmp_path_factory.mktemp(way), **given)
        return made[way]

    return run
