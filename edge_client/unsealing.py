"""What is done with a run's seal: the adapter taken out of it, another passphrase or key file given to it, or its end.

Knows a run's directory and seals; knows no tensor, and asks nobody anything (`edge_client.secrets_given`).
"""

import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_client.runs import RunDirectory
from edge_client.sealed_adapter import read_sealed
from edge_client.secrets_given import NEW_VARIABLE, sealed_cache, to_open, to_seal_with
from isthmus.durable import DRAFT, sync, write_whole
from isthmus.errors import RunError
from isthmus.trust.cache_seals import drafts_of, files_of, find
from isthmus.trust.seal_keys import KeyFile, keep, open_seal
from isthmus.trust.sealing import ENDING


def unseal(run: Path, out: Path, key_file: Path | None) -> Path:
    """Write a sealed run's adapter, as it would be without a seal, to a new folder that its owner alone can read.

    Raises:
        RunError: the run is not sealed or has no adapter, `out` is there already or cannot be written, or something
            else opens the run.
        BundleError: the adapter is damaged.
        UsageError: what opens the run was not given.
    """
    directory = _opened(run, key_file)
    _must_be_absent(out)
    files = read_sealed(directory.trained(), directory.seal) if directory.seal is not None else {}
    draft = out.with_name(f"{out.name}.{secrets.token_hex(4)}{DRAFT}")
    try:
        draft.mkdir(mode=0o700, parents=True)
        for name, content in files.items():
            write_whole(draft / name, content)
        draft.rename(out)
        sync(out.absolute().parent)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise RunError(f"{out} cannot be written ({error.strerror}); choose another --out") from None
    return out


def _must_be_absent(out: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        RunError: there is something.
    """
    if os.path.lexists(out):
        raise RunError(f"{out} is there already; choose another --out")


def reseal(run: Path, key_file: Path | None, new_key_file: Path | None) -> None:
    """Let another passphrase or key file open a run's seal, and its cache's, in place of the one that does.

    Only the files that hold the seals' keys are replaced, each whole or not at all, the run's after its cache's.

    Raises:
        RunError: the run is not sealed, something else opens it, another process writes it, or it cannot be written.
        UsageError: what opens the run, or shall open it, was not given.
    """
    directory = RunDirectory(run)
    config = directory.config()
    _must_be_sealed(directory)
    old = to_open(directory.seal_file, key_file or config.key_file)
    seal = open_seal(directory.seal_file, old)
    new = to_seal_with(new_key_file, NEW_VARIABLE)
    with directory.locked():
        try:
            kept = find(sealed_cache(config), old) if config.forward_only else None
            if kept is not None:
                keep(kept[1], kept[0], new)
            keep(seal, directory.seal_file, new)
            directory.write_config(
                config.model_copy(update={"key_file": new.path.absolute() if isinstance(new, KeyFile) else None})
            )
        except OSError as error:
            raise RunError(f"{run} cannot be written ({error.strerror}); make room, and reseal it again") from None


@dataclass(frozen=True)
class Wiped:
    """What is left after a wipe: files that are no part of a run, and the cache that the run may have filled."""

    left: tuple[Path, ...]
    cache: Path | None


def wipe(run: Path, with_cache: bool) -> Wiped:
    """Destroy a sealed run: first the key, without which nothing else opens, then the files.

    `with_cache`: also destroy every seal of the run's cache, whichever run's, and what they sealed.

    Raises:
        RunError: the run is not sealed, another process writes it, or something cannot be removed.
    """
    directory = RunDirectory(run)
    config = directory.config()
    _must_be_sealed(directory)
    cache = sealed_cache(config) if config.forward_only else None
    with directory.locked():
        try:
            destroy(directory.seal_file)
            if with_cache and cache is not None:
                _empty(cache)
            for path in directory.own_files():
                _remove(path)
        except OSError as error:
            raise RunError(f"{error.filename} cannot be removed ({error.strerror}); wipe the run again") from None
    left = tuple(sorted(run.iterdir()))
    if not left:
        with suppress(OSError):
            run.rmdir()
    return Wiped(left, None if with_cache else cache)


def destroy(path: Path) -> None:
    """Overwrite a small file before it is removed, and wait until the disk says that both are done.

    Raises:
        OSError: the disk refuses.
    """
    if path.is_file() and not path.is_symlink():
        with path.open("r+b") as file:
            file.write(secrets.token_bytes(path.stat().st_size))
            file.flush()
            os.fsync(file.fileno())
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync(path.parent)


def _empty(cache: Path) -> None:
    for path in (*files_of(cache), *drafts_of(cache)):
        destroy(path)
    for path in cache.rglob(f"*.safetensors{ENDING}"):
        path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _opened(run: Path, key_file: Path | None) -> RunDirectory:
    directory = RunDirectory(run)
    config = directory.config()
    _must_be_sealed(directory)
    directory.unlock(key_file or config.key_file)
    return directory


def _must_be_sealed(directory: RunDirectory) -> None:
    if not directory.sealed:
        raise RunError(f"{directory.path} is not sealed: its files are as they are; copy or delete them")
