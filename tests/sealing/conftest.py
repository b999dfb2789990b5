"""What these tests share: a passphrase in the environment, a command line in this process, and a sealed run beside its
plain twin.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_client import secrets_given
from edge_client.cli import main
from tests.faults.training import as_flags, run_here, settings

PASSPHRASE = "correct horse battery staple"
STEPS = 4
Edge = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def passphrase(monkeypatch: pytest.MonkeyPatch) -> str:
    """Given in the environment; what was typed in another test is forgotten."""
    monkeypatch.setattr(secrets_given, "_typed", {})
    monkeypatch.setenv(secrets_given.VARIABLE, PASSPHRASE)
    return PASSPHRASE


@pytest.fixture
def edge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Edge:
    """Exit code, standard output and standard error of an `edge_client` command, run by its entry point."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edge_client", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    return run


@pytest.fixture(scope="package")
def local(tiny_models: dict[str, Path], rows: Path) -> list[str]:
    """Flags of a short deterministic run that needs no server."""
    model = str(tiny_models["llama"])
    config = settings(None, rows, method="local", model=model, eval_data=rows, steps=STEPS, checkpoint_every=2)
    return as_flags(config)


@pytest.fixture(scope="package")
def plain(tiny_models: dict[str, Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a seal."""
    out, model = tmp_path_factory.mktemp("plain") / "run", str(tiny_models["llama"])
    run_here(settings(None, rows, method="local", model=model, eval_data=rows, steps=STEPS, checkpoint_every=2), out)
    return out


@pytest.fixture
def sealed(edge: Edge, local: list[str], tmp_path: Path) -> Path:
    """A sealed run, made by the command line."""
    out = tmp_path / "run"
    code, _, said = edge("train", *local, "--seal", "--out", out)
    assert code == 0, said
    return out
