"""A bundle whose files are held in memory: of an adapter that may not touch a disk as it is.

Knows the names and bytes of its files; knows no folder. What is in a bundle, and when it holds, is said by
`isthmus.bundle`.
"""

import hashlib
from collections.abc import Iterator, Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from isthmus.bundle import CHUNK_BYTES, MANIFEST, SIGNATURE, Kind, Manifest, Scalar, composed
from isthmus.errors import BundleError
from isthmus.trust import signing

Files = dict[str, bytes]
"""Files by name."""


def signed(
    files: Mapping[str, bytes],
    kind: Kind,
    model_digest: str,
    cut: str,
    about: Mapping[str, Scalar],
    key: Ed25519PrivateKey,
) -> tuple[Manifest, bytes]:
    """The manifest of files, and its signature; a manifest and a signature among them are left out.

    Raises:
        BundleError: a file may not be in a bundle, or a value does not fit the manifest.
    """
    entries = [
        {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(files.items())
        if name not in (MANIFEST, SIGNATURE)
    ]
    manifest = composed(entries, kind, model_digest, cut, about)
    return manifest, signing.sign(key, manifest.to_bytes())


def verify(files: Mapping[str, bytes], publisher: Ed25519PublicKey | None) -> Manifest:
    """Check a bundle: its signature (where a key is given), names, sizes and hashes.

    Raises:
        BundleError: something is missing, changed or not listed; the message names it.
    """
    for name in (MANIFEST, SIGNATURE):
        if name not in files:
            raise BundleError(f"the adapter has no {name}: restore it, or train again")
    if publisher is not None:
        signing.verify(publisher, files[MANIFEST], files[SIGNATURE])
    manifest = Manifest.parse(files[MANIFEST])
    due = {entry.name: entry for entry in manifest.files}
    odd = files.keys() ^ (due.keys() | {MANIFEST, SIGNATURE})
    if odd:
        raise BundleError(f"{min(odd)} is only in the manifest, or only beside it: restore the adapter")
    for name, entry in due.items():
        if len(files[name]) != entry.size or hashlib.sha256(files[name]).hexdigest() != entry.sha256:
            raise BundleError(f"{name} is not what the manifest says: restore the adapter")
    return manifest


def read(files: Mapping[str, bytes], manifest: Manifest) -> Iterator[tuple[int, bytes]]:
    """The files laid end to end in the manifest's order, as (offset, at most 1 MiB)."""
    offset = 0
    for entry in manifest.files:
        content = files[entry.name]
        for start in range(0, entry.size, CHUNK_BYTES):
            data = content[start : start + CHUNK_BYTES]
            yield offset, data
            offset += len(data)
