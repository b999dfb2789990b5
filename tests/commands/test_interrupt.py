"""Ctrl-C in a command that has nothing to say of its own about it still ends in a line and the shells' exit code."""

import sys

import pytest
import typer

from isthmus.command import INTERRUPTED, run


def test_a_line_says_what_is_kept(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cloud_node"])
    app = typer.Typer()

    @app.command()
    def waits() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run(app, "cloud_node")
    assert ended.value.code == INTERRUPTED
    assert capsys.readouterr().err.startswith("cloud_node: interrupted; what was fetched or saved is kept")
