"""Taking in a bundle chunk by chunk, and going on where an interrupted fetch stopped.

Knows a cache folder and the bundle's manifest; knows neither the wire nor what the files mean.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from isthmus.bundle import MANIFEST, MAX_MANIFEST_BYTES, SIGNATURE, Manifest, open_listed, pieces, verify
from isthmus.durable import DRAFT, sync, write_whole
from isthmus.errors import BundleError
from isthmus.faults import Fault, passing
from isthmus.trust import signing


def cached(cache: Path, bundle_id: str, publisher: Ed25519PublicKey | None = None) -> Path | None:
    """The folder of a complete bundle in the cache, verified again, or None.

    The id pins every byte but the signature, which must be the publisher's where one is given.

    Raises:
        BundleError: the id is not a SHA-256 in hex.
    """
    folder = cache / _checked_id(bundle_id)
    try:
        return folder if verify(folder, publisher).id == bundle_id else None
    except BundleError:
        return None


TRIES = 5
"""To make room beside other receivers of the same bundle."""


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
        passing(Fault.FETCH_HALF_ARRIVED)

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
            ready = cached(self._cache, self._id, self._publisher)
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
            with open_listed(self._part, MANIFEST) as file:
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
        for left in reversed(range(TRIES)):
            try:
                self._cache.mkdir(parents=True, exist_ok=True)
                self._part.mkdir(mode=0o700, exist_ok=True)
                self._fill(manifest, content, signature)
            except FileNotFoundError as error:
                if not left:  # else another receiver has just renamed the folder away, or tidied up in it
                    raise BundleError(f"{self._part} cannot be written ({error.strerror}): fetch again") from error
            except OSError as error:
                raise BundleError(f"{self._part} cannot be written ({error.strerror}): check the disk") from error
            else:
                return

    def _fill(self, manifest: Manifest, content: bytes, signature: bytes) -> None:
        if self._part.is_symlink():
            raise BundleError(f"{self._part} is a link: remove it")
        for entry in manifest.files:
            os.close(os.open(self._part / entry.name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        write_whole(self._part / SIGNATURE, signature)
        write_whole(self._part / MANIFEST, content)

    def _write(self, manifest: Manifest, data: bytes) -> None:
        rest = memoryview(data)
        for entry, start, count in pieces(manifest, self._offset, len(data)):
            # Not O_CREAT: a folder that another receiver renamed away must be noticed.
            with os.fdopen(os.open(self._part / entry.name, os.O_WRONLY | os.O_NOFOLLOW), "wb") as file:
                file.seek(start)
                file.write(rest[:count])
            rest = rest[count:]

    def _publish(self, manifest: Manifest) -> Path:
        if self._final.is_dir() and cached(self._cache, self._id, self._publisher) is None:
            shutil.rmtree(self._final, ignore_errors=True)
        try:
            for name in (*(entry.name for entry in manifest.files), "."):
                sync(self._part / name)
            self._part.rename(self._final)
            sync(self._cache)
        except OSError as error:
            if cached(self._cache, self._id, self._publisher) is None:
                raise BundleError(f"{self._final} cannot be written ({error.strerror}): check the disk") from error
            shutil.rmtree(self._part, ignore_errors=True)
        return self._final


def _checked_id(bundle_id: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", bundle_id):
        raise BundleError(f"bundle id {bundle_id[:80]!r} is not a SHA-256 in hex: check the server's version")
    return bundle_id
