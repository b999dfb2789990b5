"""Pairwise masks: what each two edges add and subtract, so that a sum over all holds none of it.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869) with run, round, attempt and both identities in their order, AES-256 in
counter mode as the keystream: no step has less than 128 bits of strength. Knows keys and integers; whose a key is was
checked before (`signed_keys`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from isthmus.errors import WireError
from isthmus.rounds.quantised import Vector

_PURPOSE = b"isthmus round mask v1"


@dataclass(frozen=True)
class Attempt:
    """One attempt at a round: what every key and signature of it is bound to."""

    run: str
    round: int
    number: int

    def bound(self, *further: bytes) -> bytes:
        """These names, and further ones, as bytes that no other names have."""
        parts = (self.run.encode(), str(self.round).encode(), str(self.number).encode(), *further)
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def masked(
    vector: Vector, me: str, key: X25519PrivateKey, others: Mapping[str, bytes], attempt: Attempt, roster: bytes
) -> Vector:
    """`vector` with a mask for each other edge: added by the one whose identity comes first, subtracted by the other.

    Args:
        vector: [values], of this edge.
        me: this edge's identity.
        key: this edge's, made for this attempt and never used in another.
        others: 32-byte public keys by identity.
        attempt: which masks are for.
        roster: digest of all keys; edges that were shown other keys get other masks, and no sum.

    Raises:
        WireError: a public key is none that a secret can be agreed on with.
    """
    total = vector.copy()
    for other in sorted(others):
        stream = _keystream(_shared(key, others[other]), me, other, attempt, roster, len(vector))
        total = total + stream if me < other else total - stream
    return total


def _shared(key: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except (ValueError, UnsupportedAlgorithm):  # of another length, or of small order
        raise WireError("an edge of this round sent a public key that is none; ask the model owner which") from None


def _keystream(secret: bytes, me: str, other: str, attempt: Attempt, roster: bytes, values: int) -> Vector:
    low, high = sorted((me, other))
    info = _PURPOSE + attempt.bound(low.encode(), high.encode())
    key = HKDF(SHA256(), length=32, salt=roster, info=info).derive(secret)
    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()  # each key makes one stream
    return np.frombuffer(cipher.update(bytes(4 * values)) + cipher.finalize(), dtype="<u4").astype(np.uint32)
