"""Text of a model on standard output: no command to a terminal, and as it is anywhere else."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_client import chatting, finished
from edge_client.finished import Continuation
from edge_client.finished_cli import generate_command
from edge_client.using_cli import chat_command

SAID = "\x1b]0;mine\x07 \x03\r\x7f\x9b2J\tone\ntwo \x85\x00 é\N{SNOWMAN}"
SHOWN = "�]0;mine� ����2J\tone\ntwo �� é\N{SNOWMAN}"


class Terminal(io.StringIO):
    """Standard output that somebody sits before."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    """Commands that show what a model says, which is this."""

    def converse(run: object, using: object, lines: object, show: Callable[[str], None], *_: object) -> None:
        show(SAID)
        show("\n")

    monkeypatch.setattr(finished, "continue_prompt", lambda *_: Continuation(SAID, 0, 0))
    monkeypatch.setattr(chatting, "converse", converse)
    return {
        "generate": lambda: generate_command(Path("run"), "why"),
        "chat": lambda: chat_command(Path("run")),
    }


@pytest.mark.parametrize("name", ["generate", "chat"])
@pytest.mark.parametrize(("output", "due"), [(Terminal, SHOWN), (io.StringIO, SAID)], ids=["terminal", "pipe"])
def test_what_a_model_says_commands_no_terminal_and_reaches_a_pipe_as_it_is(
    commands: dict[str, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    output: type[io.StringIO],
    due: str,
) -> None:
    shown = output()
    monkeypatch.setattr("sys.stdout", shown)
    commands[name]()
    assert shown.getvalue().startswith(due + "\n")
