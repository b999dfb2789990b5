"""What both command lines share: one-line errors with their exit codes, and where caches live.

Knows the error catalogue and typer; knows no command.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, cast

import typer

from isthmus import faults
from isthmus.errors import IsthmusError, UsageError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
KEPT_BYTES = 512 << 20
INTERRUPTED = 130
"""Exit code of a command that was ended by Ctrl-C, as shells have it."""

# What the parser raises. Typer carries its own copy of click and exports only this child of click's UsageError.
_WRONG_USE = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def run(app: typer.Typer, name: str) -> NoReturn:
    """Run a command line; an error of the catalogue or of the flags becomes one line and its exit code."""
    keep_freed_memory()
    try:
        warn_of_faults(name)
        status = app(prog_name=name, standalone_mode=False)
    except IsthmusError as error:
        _say(name, str(error))
        raise SystemExit(error.exit_code) from None
    except _WRONG_USE as error:
        message, path = error.format_message().rstrip("."), error.ctx.command_path if error.ctx else name
        if message:  # empty where no arguments were given, and the help was shown instead
            _say(name, f"{message}; see `{path} --help`")
        raise SystemExit(UsageError.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:  # which typer makes of Ctrl-C by itself
        _say(name, "interrupted; what was fetched or saved is kept: run it again, with --resume if it has that")
    raise SystemExit(status or 0)


def warn_of_faults(name: str) -> None:
    """Arm the point that the environment names, if it names one, and say so.

    Raises:
        UsageError: there is no such point.
    """
    if (armed := faults.arm(os.environ)) is not None:
        _say(name, armed)


def keep_freed_memory() -> None:
    """Let glibc keep tensor-sized blocks for reuse: giving them back makes each message fault its pages in anew."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def importing() -> Iterator[None]:
    """In here no garbage is looked for, nor ever among what is there at the end.

    Importing torch and transformers makes objects by the 100,000 that all stay; looking through them, and once more
    when the process ends, took 1.5 of the 5.3 s of processor time that a command began and ended with. Where torch is
    there already, nothing is changed.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _say(name: str, message: str) -> None:
    sys.stderr.write(f"{name}: {' '.join(message.split())}\n")


def cache_directory() -> Path:
    """Where bundles are kept between runs: `$ISTHMUS_CACHE`, or `isthmus` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ISTHMUS_CACHE") or Path(home) / "isthmus")
