"""`cloud_node policy check`: what a policy file lets each tenant do, before a node goes by it.

Knows a file and how to print it; asks no node.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from cloud_node.policy.rules import Policy, Rights, identity_of, read_policy

app = typer.Typer(no_args_is_help=True, help="Look at a policy file.")

LISTS = ("models", "methods", "exchanges", "cuts", "emulators", "rounds")


@app.callback()
def _root() -> None:
    """Look at a policy file: who may do what, and how much."""


@app.command(epilog="Example: cloud_node policy check policy.yaml")
def check(
    file: Annotated[Path, typer.Argument(help="The policy file.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check a policy file and print what each tenant may do."""
    policy = read_policy(file)
    if as_json:
        typer.echo(json.dumps(_told(policy), indent=2))
        return
    for name, rights in policy.tenants.items():
        typer.echo("\n".join([identity_of(name), *_lines(rights)]))
    if policy.default is None:
        typer.echo("everybody else\n  is refused")
    else:
        typer.echo("\n".join(["everybody else (default)", *_lines(policy.default)]))


def _told(policy: Policy) -> dict[str, object]:
    named = {identity_of(name): rights.model_dump() for name, rights in policy.tenants.items()}
    default = policy.default.model_dump() if policy.default is not None else None
    return {"tenants": named, "default": default, "hidden_margin": policy.hidden_margin}


def _lines(rights: Rights) -> list[str]:
    listed = [f"  {name:<10} {', '.join(getattr(rights, name)) or 'none'}" for name in LISTS]
    limits = {name: value for name, value in rights.limits.model_dump().items() if value is not None}
    bounds = [f"  {name:<20} {value:>14,}" for name, value in limits.items()]
    return [*listed, f"  {'submit':<10} {'yes' if rights.submit else 'no'}", *(bounds or ["  no limits of its own"])]
