"""Bundles on the owner's own disk: verified as an edge would, with a remedy that an owner has.

Knows bundles and words; knows nothing of what bundles hold.
"""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from isthmus import bundle
from isthmus.errors import BundleError, IsthmusError


def verify(directory: Path, remedy: str, publisher: Ed25519PublicKey | None = None) -> bundle.Manifest:
    """As `isthmus.bundle.verify`, which tells whoever fetched a bundle to fetch it again; here `remedy` is told.

    Raises:
        BundleError: something is missing, changed, damaged or not listed; the message names it.
    """
    try:
        return bundle.verify(directory, publisher)
    except BundleError as error:
        raise BundleError(f"{reason_of(error)}: {remedy}") from None


def reason_of(error: IsthmusError) -> str:
    """What is wrong, without what to do about it."""
    reason, _, remedy = str(error).rpartition(": ")
    return reason or remedy
