"""Signed, content-addressed folders of files: ends, emulators, adapters.

Knows names, sizes, hashes and one signature; never what the files mean, nor the wire that carries them. A folder
holds `manifest.json` (canonical JSON), `manifest.sig` (Ed25519 over its bytes) and the files it lists. The SHA-256 of
the manifest is the bundle's id, so that whoever has the id can check everything else.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from isthmus.errors import BundleError
from isthmus.trust import signing

CHUNK_BYTES = 1 << 20
MAX_FILES = 4096
MAX_MANIFEST_BYTES = 1 << 20
MANIFEST, SIGNATURE, DRAFT = "manifest.json", "manifest.sig", ".tmp"

Kind = Literal["ends", "emulator", "adapter"]
Scalar = str | int | float | bool | None

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*\.(safetensors|json|txt|jinja|model)$"
_DIGEST = r"^[0-9a-f]{64}$"


class Entry(BaseModel):
    """One file of a bundle."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: Annotated[str, Field(pattern=_NAME, max_length=200)]
    size: Annotated[int, Field(ge=0, lt=1 << 53)]
    sha256: Annotated[str, Field(pattern=_DIGEST)]

    @model_validator(mode="after")
    def _is_not_the_manifest(self) -> Self:
        if self.name.lower() == MANIFEST:
            raise ValueError("a file may not be named as the manifest")
        return self


class Manifest(BaseModel):
    """What a bundle holds, for which model and cut."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())

    format: Literal["isthmus-bundle/1"] = "isthmus-bundle/1"
    kind: Kind
    model_digest: Annotated[str, Field(pattern=_DIGEST)]
    cut: Annotated[str, Field(pattern=r"^[0-9]{1,5}:[0-9]{1,5}$")]
    about: dict[str, Scalar]
    files: Annotated[tuple[Entry, ...], Field(max_length=MAX_FILES)]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        # Also on file systems that ignore case.
        if len({entry.name.lower() for entry in self.files}) < len(self.files):
            raise ValueError("two files have the same name")
        return self

    @classmethod
    def parse(cls, content: bytes) -> "Manifest":
        """Read canonical bytes, as `to_bytes` makes them.

        Raises:
            BundleError: they are anything else.
        """
        if len(content) > MAX_MANIFEST_BYTES:
            raise BundleError(f"the manifest is over {MAX_MANIFEST_BYTES} bytes: have the bundle built anew")
        try:
            manifest = cls.model_validate_json(content)
            canonical = manifest.to_bytes()
        except ValueError as error:
            raise _malformed(error) from error
        if canonical != content:
            raise BundleError("the manifest is not canonical JSON: have the bundle built anew")
        return manifest

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8."""
        text = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()

    @property
    def id(self) -> str:
        """SHA-256 in hex of the manifest's bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)


def write(
    directory: Path,
    kind: Kind,
    model_digest: str,
    cut: str,
    about: Mapping[str, Scalar],
    key: Ed25519PrivateKey,
) -> Manifest:
    """Make a bundle of the files already in `directory`, by writing its manifest and signature.

    Raises:
        BundleError: a file may not be in a bundle, or a value does not fit the manifest.
    """
    names = sorted(_listing(directory) - {MANIFEST, SIGNATURE})
    entries = []
    for name in names:
        with _open(directory, name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries.append({"name": name, "size": file.tell(), "sha256": digest})
    fields = {"kind": kind, "model_digest": model_digest, "cut": cut, "about": dict(about), "files": tuple(entries)}
    try:
        content = Manifest.model_validate(fields).to_bytes()
        manifest = Manifest.parse(content)
        _replace(directory / SIGNATURE, signing.sign(key, content))
        _replace(directory / MANIFEST, content)
    except BundleError:
        raise
    except ValueError as error:
        raise _malformed(error) from error
    except OSError as error:
        raise BundleError(f"{directory} cannot be written ({error.strerror}): check the disk") from error
    return manifest


def verify(directory: Path, publisher: Ed25519PublicKey | None) -> Manifest:
    """Check a bundle on disk: its signature (where a key is given), names, sizes and hashes.

    Raises:
        BundleError: something is missing, changed, damaged or not listed; the message names it.
    """
    with _open(directory, MANIFEST) as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    with _open(directory, SIGNATURE) as file:
        signature = file.read(signing.SIGNATURE_BYTES + 1)
    if publisher is not None:
        signing.verify(publisher, content, signature)
    manifest = Manifest.parse(content)
    extra = _listing(directory) - {MANIFEST, SIGNATURE} - {entry.name for entry in manifest.files}
    if extra:
        raise BundleError(f"{directory / min(extra)} is not listed in the manifest: remove it")
    for entry in manifest.files:
        _check_file(directory, entry)
    return manifest


def read(directory: Path, manifest: Manifest, offset: int) -> Iterator[tuple[int, bytes]]:
    """The files laid end to end in the manifest's order, from `offset`, as (offset, at most 1 MiB).

    Raises:
        BundleError: the offset is outside the bundle, or, while reading, a file became shorter.
    """
    if not 0 <= offset <= manifest.total_bytes:
        raise BundleError(f"offset {offset} is outside the bundle's {manifest.total_bytes} bytes: fetch from 0")
    return _chunks(directory, manifest, offset)


def cached(cache: Path, bundle_id: str) -> Path | None:
    """The folder of a complete bundle in the cache, verified again, or None.

    The signature is not asked for: the id pins every byte.

    Raises:
        BundleError: the id is not a SHA-256 in hex.
    """
    folder = cache / _checked_id(bundle_id)
    try:
        return folder if verify(folder, None).id == bundle_id else None
    except BundleError:
        return None


class Receiver:
    """Takes in a bundle chunk by chunk and goes on where an interrupted fetch stopped.

    What has arrived stands in `cache/ID.part`; its files' sizes say how far it got. Two receivers of one id may work
    at once: they write the same bytes at the same places, and the first to finish wins.
    """

    def __init__(self, cache: Path, bundle_id: str, publisher: Ed25519PublicKey | None) -> None:
        """Look for what is already there; nothing is written.

        Raises:
            BundleError: the id is not a SHA-256 in hex.
        """
        self._id = _checked_id(bundle_id)
        self._cache = cache
        self._final = cache / bundle_id
        self._part = cache / f"{bundle_id}.part"
        self._publisher = publisher
        self._manifest = self._kept_manifest()
        self._offset = self._kept_bytes(self._manifest) if self._manifest else 0

    @property
    def offset(self) -> int:
        """The first byte still missing, counted over the files laid end to end."""
        return self._offset

    def begin(self, manifest: bytes, signature: bytes) -> Manifest:
        """Check what the sender announces, then make room for it.

        Raises:
            BundleError: the manifest has another id or is malformed, the signature is not the publisher's, or the disk
                is too small. Nothing was written.
        """
        if hashlib.sha256(manifest).hexdigest() != self._id:
            raise BundleError(f"the manifest is not that of bundle {self._id}: check the server, and fetch again")
        if len(signature) != signing.SIGNATURE_BYTES:
            raise BundleError(f"the signature is not {signing.SIGNATURE_BYTES} bytes: check the server")
        if self._publisher is not None:
            signing.verify(self._publisher, manifest, signature)
        parsed = Manifest.parse(manifest)
        self._check_space(parsed)
        self._make_room(parsed, manifest, signature)
        self._manifest = parsed
        return parsed

    def add(self, offset: int, data: bytes) -> None:
        """Write the next bytes.

        Raises:
            BundleError: `begin` was not called, `offset` is not the next byte, there is too much data, or the disk
                refuses.
        """
        manifest = self._begun()
        if offset != self._offset or offset + len(data) > manifest.total_bytes:
            raise BundleError(
                f"bytes {offset}+{len(data)} do not continue at {self._offset} of {manifest.total_bytes}: fetch again"
            )
        try:
            self._write(manifest, data)
        except OSError as error:
            # Another receiver may have finished this very bundle, and so renamed the folder.
            if not self._final.is_dir():
                raise BundleError(f"{self._part} cannot be written ({error.strerror}): check the disk") from error
        self._offset += len(data)

    def finish(self) -> Path:
        """Verify everything and rename it into place.

        Returns:
            The complete bundle's folder.

        Raises:
            BundleError: bytes are missing, or the content is not what the manifest says; what is damaged is deleted,
                so that a new fetch starts clean.
        """
        manifest = self._begun()
        if self._offset < manifest.total_bytes:
            raise BundleError(f"{manifest.total_bytes - self._offset} bytes are missing: fetch again to go on")
        # Left by a receiver that was killed in `begin`.
        for draft in self._part.glob(f"*{DRAFT}"):
            draft.unlink(missing_ok=True)
        try:
            verify(self._part, self._publisher)
        except BundleError:
            shutil.rmtree(self._part, ignore_errors=True)
            ready = cached(self._cache, self._id)
            if ready is None:
                raise
            return ready
        return self._publish(manifest)

    def _begun(self) -> Manifest:
        if self._manifest is None:
            raise BundleError("no manifest came first: check that the server speaks the same version")
        return self._manifest

    def _kept_manifest(self) -> Manifest | None:
        try:
            with _open(self._part, MANIFEST) as file:
                content = file.read(MAX_MANIFEST_BYTES + 1)
            return Manifest.parse(content) if hashlib.sha256(content).hexdigest() == self._id else None
        except BundleError:
            return None

    def _kept_bytes(self, manifest: Manifest) -> int:
        kept = 0
        for entry in manifest.files:
            try:
                size = (self._part / entry.name).lstat().st_size
            except OSError:
                return kept
            kept += min(size, entry.size)
            if size < entry.size:
                return kept
        return kept

    def _check_space(self, manifest: Manifest) -> None:
        cache = self._cache.absolute()
        standing = next(folder for folder in (cache, *cache.parents) if folder.exists())
        missing, free = manifest.total_bytes - self._offset, shutil.disk_usage(standing).free
        if missing > free:
            raise BundleError(f"{cache} has {free} bytes free and the bundle needs {missing}: make room")

    def _make_room(self, manifest: Manifest, content: bytes, signature: bytes) -> None:
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            self._part.mkdir(mode=0o700, exist_ok=True)
            if self._part.is_symlink():
                raise BundleError(f"{self._part} is a link: remove it")
            for entry in manifest.files:
                os.close(os.open(self._part / entry.name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            _replace(self._part / SIGNATURE, signature)
            _replace(self._part / MANIFEST, content)
        except OSError as error:
            raise BundleError(f"{self._part} cannot be written ({error.strerror}): check the disk") from error

    def _write(self, manifest: Manifest, data: bytes) -> None:
        rest = memoryview(data)
        for entry, start, count in _spans(manifest, self._offset, len(data)):
            # Not O_CREAT: a folder that another receiver renamed away must be noticed.
            with os.fdopen(os.open(self._part / entry.name, os.O_WRONLY | os.O_NOFOLLOW), "wb") as file:
                file.seek(start)
                file.write(rest[:count])
            rest = rest[count:]

    def _publish(self, manifest: Manifest) -> Path:
        if self._final.is_dir() and cached(self._cache, self._id) is None:
            shutil.rmtree(self._final, ignore_errors=True)
        try:
            for name in (*(entry.name for entry in manifest.files), "."):
                _sync(self._part / name)
            self._part.rename(self._final)
            _sync(self._cache)
        except OSError as error:
            if cached(self._cache, self._id) is None:
                raise BundleError(f"{self._final} cannot be written ({error.strerror}): check the disk") from error
            shutil.rmtree(self._part, ignore_errors=True)
        return self._final


def _checked_id(bundle_id: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", bundle_id):
        raise BundleError(f"bundle id {bundle_id[:80]!r} is not a SHA-256 in hex: check the server's version")
    return bundle_id


def _malformed(error: ValueError) -> BundleError:
    reason = str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        reason = f"{where}: {first['msg']}, got {str(first['input'])[:80]!r}"
    return BundleError(f"the manifest is malformed ({reason}): have the bundle built anew")


def _listing(directory: Path) -> set[str]:
    try:
        return {path.name for path in directory.iterdir()}
    except OSError as error:
        raise BundleError(f"{directory} cannot be read ({error.strerror}): name a bundle's folder") from error


def _open(directory: Path, name: str) -> BufferedReader:
    """Open a regular file, never a link to one."""
    path = directory / name
    try:
        # Non-blocking, since opening a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): fetch the bundle again") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{path} is not a regular file: remove it")
    return os.fdopen(descriptor, "rb")


def _check_file(directory: Path, entry: Entry) -> None:
    with _open(directory, entry.name) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.size:
            raise BundleError(
                f"{directory / entry.name} has {size} bytes, not {entry.size}: delete the bundle and fetch it again"
            )
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise BundleError(
                f"{directory / entry.name} is not what its hash says: delete the bundle and fetch it again"
            )


def _spans(manifest: Manifest, offset: int, length: int) -> Iterator[tuple[Entry, int, int]]:
    """The pieces (file, start in it, bytes) of `length` bytes from `offset` over the files laid end to end."""
    first, end = 0, offset + length
    for entry in manifest.files:
        start, stop = max(offset, first), min(end, first + entry.size)
        if start < stop:
            yield entry, start - first, stop - start
        first += entry.size


def _chunks(directory: Path, manifest: Manifest, offset: int) -> Iterator[tuple[int, bytes]]:
    for entry, start, count in _spans(manifest, offset, manifest.total_bytes - offset):
        with _open(directory, entry.name) as file:
            file.seek(start)
            stop = offset + count
            while offset < stop:
                data = file.read(min(CHUNK_BYTES, stop - offset))
                if not data:
                    raise BundleError(f"{directory / entry.name} became shorter: have the bundle built anew")
                yield offset, data
                offset += len(data)


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    if path.is_file() and not path.is_symlink() and path.read_bytes() == content:
        return
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}{DRAFT}")
    with draft.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
