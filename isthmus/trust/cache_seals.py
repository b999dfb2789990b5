"""The seals of a folder that many runs share, such as a cache: one for each secret, in files of their own.

Knows `seals/` in that folder, and which of its files a secret opens; knows nothing of what is sealed. A secret that
opens none has simply kept nothing there yet, so a wrong one is no error.
"""

import os
from contextlib import suppress
from pathlib import Path

from isthmus.durable import DRAFT
from isthmus.errors import BundleError, RunError
from isthmus.trust.seal_keys import SealFile, Secret, keep, open_seal
from isthmus.trust.sealing import Seal

FOLDER = "seals"
MOST_TRIED = 16
"""The most recently used, since each may cost an scrypt of its own."""


def seal_of(directory: Path, secret: Secret) -> Seal:
    """The seal that `secret` opens in a shared folder, made if there is none.

    Raises:
        RunError: it cannot be written.
    """
    found = find(directory, secret)
    if found is not None:
        with suppress(OSError):
            os.utime(found[0])
        return found[1]
    seal = Seal.new()
    try:
        (directory / FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
        keep(seal, directory / FOLDER / f"{seal.id.hex()}.json", secret, _salt_beside(directory))
    except OSError as error:
        raise RunError(f"{directory} cannot be written ({error.strerror}); give another --cache") from None
    return seal


def find(directory: Path, secret: Secret) -> tuple[Path, Seal] | None:
    """The seal that `secret` opens in a shared folder, and its file; None: there is none."""
    for path in _newest_first(directory):
        with suppress(RunError, BundleError):
            return path, open_seal(path, secret)
    return None


def files_of(directory: Path) -> list[Path]:
    """The files of all seals in a shared folder."""
    return sorted((directory / FOLDER).glob("*.json"))


def drafts_of(directory: Path) -> list[Path]:
    """What a process that was killed left of them: an earlier secret may still open it."""
    return sorted((directory / FOLDER).glob(f"*{DRAFT}"))


def _salt_beside(directory: Path) -> str | None:
    for path in _newest_first(directory):
        with suppress(RunError, BundleError):
            scrypt = SealFile.load(path).scrypt
            if scrypt is not None:
                return scrypt.salt
    return None


def _newest_first(directory: Path) -> list[Path]:
    aged = []
    for path in files_of(directory):
        with suppress(OSError):
            aged.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(aged, reverse=True)[:MOST_TRIED]]
