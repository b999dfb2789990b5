"""Every command explains itself, with an example to copy."""

import pytest
from typer.testing import CliRunner

from tests.commands.tree import APPS, commands, path_name


@pytest.mark.parametrize("path", [path for app in APPS for path in commands(app)], ids=path_name)
def test_every_command_has_help_and_those_that_do_something_an_example(path: tuple[str, ...]) -> None:
    name, *rest = path
    result = CliRunner().invoke(APPS[name], [*rest, "--help"], prog_name=name, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert f"Usage: {' '.join(path)}" in result.output
    if commands(name)[path]:
        words = " ".join(result.output.replace("│", " ").split())
        assert f"Example: {' '.join(path)} " in words
