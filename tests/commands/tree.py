"""The commands and flags that there are, as the command lines themselves tell."""

from typing import Any

import typer

import cloud_node.cli
import edge_client.cli

APPS = {"cloud_node": cloud_node.cli.app, "edge_client": edge_client.cli.app}


def commands(name: str) -> dict[tuple[str, ...], frozenset[str]]:
    """Each command of `name` by its path, with its flags and arguments; a group of commands has none."""
    found: dict[tuple[str, ...], frozenset[str]] = {}

    def visit(path: tuple[str, ...], command: Any) -> None:
        children = getattr(command, "commands", {})
        parameters = [] if children else [parameter for parameter in command.params if parameter.name != "help"]
        found[path] = frozenset(
            option if option.startswith("-") else option.upper() for each in parameters for option in each.opts
        )
        for child, below in children.items():
            visit((*path, child), below)

    visit((name,), typer.main.get_command(APPS[name]))
    return found


def path_name(path: tuple[str, ...]) -> str:
    """A command as it is typed."""
    return " ".join(path)
