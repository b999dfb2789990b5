"""Where the passphrase or key file that opens a seal comes from: a flag, the environment, or who is at the terminal.

Knows the variable, the flag and how to ask; keeps what was asked for as long as the process lives, and writes nothing.
"""

import getpass
import os
import sys
from pathlib import Path

from edge_client.config import TrainConfig
from isthmus.command import cache_directory
from isthmus.errors import RunError, UsageError
from isthmus.trust.seal_keys import KeyFile, Passphrase, SealFile, Secret

VARIABLE = "ISTHMUS_PASSPHRASE"
NEW_VARIABLE = "ISTHMUS_NEW_PASSPHRASE"
"""Of `edge_client reseal`, which needs two."""

_typed: dict[str, str] = {}  # by the variable in whose place it was asked for: a command asks once


def to_seal_with(key_file: Path | None, variable: str = VARIABLE) -> Secret:
    """What a new seal shall be opened with: the key file if one is given, else a passphrase.

    Raises:
        UsageError: there is neither, and nobody to ask.
        RunError: the key file cannot be used.
    """
    return KeyFile.load(key_file) if key_file is not None else Passphrase(_passphrase("to seal it with", variable, 2))


def to_open(seal: Path, key_file: Path | None, ask: bool = True) -> Secret:
    """What opens a seal's file, by what it says of itself.

    Raises:
        UsageError: it was not given, and there is nobody to ask, or nobody shall be asked.
        RunError: the file is missing, or the key file cannot be used.
        BundleError: the file is damaged.
    """
    if SealFile.load(seal).opened_by == "passphrase":
        return Passphrase(_passphrase(f"of {seal.parent}", VARIABLE, 1 if ask else 0))
    if key_file is None:
        raise UsageError(f"{seal.parent} is sealed with a key file; name it with --key-file FILE")
    return KeyFile.load(key_file)


def sealed_cache(config: TrainConfig) -> Path:
    """Where a sealed run keeps the span's outputs: apart from those that are not sealed, unless one place is named."""
    return config.cache or cache_directory() / "outputs-sealed"


def _passphrase(what: str, variable: str, times: int) -> str:
    given = os.environ.get(variable)
    if given is None and times and sys.stdin.isatty():
        given = _asked(what, variable, times)
    if given is None:
        raise UsageError(f"no passphrase {what}: set {variable}, or give --key-file FILE if a key file seals it")
    if not given:
        raise UsageError(f"the passphrase {what} is empty; set {variable} to one, or unset it to be asked")
    return given


def _asked(what: str, variable: str, times: int) -> str:
    if variable not in _typed:
        typed = [getpass.getpass(f"Passphrase {what}{', again' if again else ''}: ") for again in range(times)]
        if len(set(typed)) > 1:
            raise RunError("the two passphrases differ; begin again")
        _typed[variable] = typed[0]
    return _typed[variable]
