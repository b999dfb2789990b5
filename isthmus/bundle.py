"""Signed, content-addressed folders of files: ends, emulators, adapters.

Knows names, sizes, hashes and one signature; never what the files mean, nor the wire that carries them. A folder
holds `manifest.json` (canonical JSON), `manifest.sig` (Ed25519 over its bytes) and the files it lists. The SHA-256 of
the manifest is the bundle's id, so that whoever has the id can check everything else.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from isthmus.durable import write_whole
from isthmus.errors import BundleError
from isthmus.trust import signing

CHUNK_BYTES = 1 << 20
MAX_FILES = 4096
MAX_MANIFEST_BYTES = 1 << 20
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"

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
        with open_listed(directory, name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries.append({"name": name, "size": file.tell(), "sha256": digest})
    manifest = composed(entries, kind, model_digest, cut, about)
    content = manifest.to_bytes()
    try:
        write_whole(directory / SIGNATURE, signing.sign(key, content))
        write_whole(directory / MANIFEST, content)
    except OSError as error:
        raise BundleError(f"{directory} cannot be written ({error.strerror}): check the disk") from error
    return manifest


def composed(
    entries: Sequence[Mapping[str, Any]], kind: Kind, model_digest: str, cut: str, about: Mapping[str, Scalar]
) -> Manifest:
    """The manifest of files that are described by the fields of `Entry`.

    Raises:
        BundleError: a file may not be in a bundle, or a value does not fit the manifest.
    """
    fields = {"kind": kind, "model_digest": model_digest, "cut": cut, "about": dict(about), "files": tuple(entries)}
    try:
        return Manifest.parse(Manifest.model_validate(fields).to_bytes())
    except BundleError:
        raise
    except ValueError as error:
        raise _malformed(error) from error


def verify(directory: Path, publisher: Ed25519PublicKey | None) -> Manifest:
    """Check a bundle on disk: its signature (where a key is given), names, sizes and hashes.

    Raises:
        BundleError: something is missing, changed, damaged or not listed; the message names it.
    """
    with open_listed(directory, MANIFEST) as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    signature = read_signature(directory)
    if publisher is not None:
        signing.verify(publisher, content, signature)
    manifest = Manifest.parse(content)
    extra = _listing(directory) - {MANIFEST, SIGNATURE} - {entry.name for entry in manifest.files}
    if extra:
        raise BundleError(f"{directory / min(extra)} is not listed in the manifest: remove it")
    for entry in manifest.files:
        _check_file(directory, entry)
    return manifest


def is_signed_by(publisher: Ed25519PublicKey, manifest: bytes, signature: bytes) -> bool:
    """Whether a signature is the publisher's over a manifest's bytes, for whoever has words of its own if it is not."""
    try:
        signing.verify(publisher, manifest, signature)
    except BundleError:
        return False
    return True


def read_signature(directory: Path) -> bytes:
    """The signature beside a bundle's manifest, of whatever length.

    Raises:
        BundleError: it is missing.
    """
    with open_listed(directory, SIGNATURE) as file:
        return file.read(signing.SIGNATURE_BYTES + 1)


def read(directory: Path, manifest: Manifest, offset: int) -> Iterator[tuple[int, bytes]]:
    """The files laid end to end in the manifest's order, from `offset`, as (offset, at most 1 MiB).

    Raises:
        BundleError: the offset is outside the bundle, or, while reading, a file became shorter.
    """
    if not 0 <= offset <= manifest.total_bytes:
        raise BundleError(f"offset {offset} is outside the bundle's {manifest.total_bytes} bytes: fetch from 0")
    return _chunks(directory, manifest, offset)


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


def open_listed(directory: Path, name: str) -> BufferedReader:
    """Open a regular file, never a link to one."""
    path = directory / name
    try:
        # Non-blocking, since opening a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}): name a whole bundle, or fetch it again"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{path} is not a regular file: remove it")
    return os.fdopen(descriptor, "rb")


def _check_file(directory: Path, entry: Entry) -> None:
    with open_listed(directory, entry.name) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.size:
            raise BundleError(
                f"{directory / entry.name} has {size} bytes, not {entry.size}: delete the bundle and fetch it again"
            )
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise BundleError(
                f"{directory / entry.name} is not what its hash says: delete the bundle and fetch it again"
            )


def pieces(manifest: Manifest, offset: int, length: int) -> Iterator[tuple[Entry, int, int]]:
    """The pieces (file, start in it, bytes) of `length` bytes from `offset` over the files laid end to end."""
    first, end = 0, offset + length
    for entry in manifest.files:
        start, stop = max(offset, first), min(end, first + entry.size)
        if start < stop:
            yield entry, start - first, stop - start
        first += entry.size


def _chunks(directory: Path, manifest: Manifest, offset: int) -> Iterator[tuple[int, bytes]]:
    for entry, start, count in pieces(manifest, offset, manifest.total_bytes - offset):
        with open_listed(directory, entry.name) as file:
            file.seek(start)
            stop = offset + count
            while offset < stop:
                data = file.read(min(CHUNK_BYTES, stop - offset))
                if not data:
                    raise BundleError(f"{directory / entry.name} became shorter: have the bundle built anew")
                yield offset, data
                offset += len(data)
