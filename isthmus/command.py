"""What both command lines share: one-line errors with their exit codes, and where caches live.

Knows the error catalogue and typer; knows no command.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

import typer

from isthmus.errors import IsthmusError


def run(app: typer.Typer, name: str) -> NoReturn:
    """Run a command line; an error of the catalogue becomes one line and its exit code."""
    try:
        app(prog_name=name)
    except IsthmusError as error:
        sys.stderr.write(f"{name}: {' '.join(str(error).split())}\n")
        raise SystemExit(error.exit_code) from None
    raise SystemExit(0)


def cache_directory() -> Path:
    """Where bundles are kept between runs: `$ISTHMUS_CACHE`, or `isthmus` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ISTHMUS_CACHE") or Path(home) / "isthmus")
