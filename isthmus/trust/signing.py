"""Ed25519 signatures, and the files that hold their keys.

Knows keys and bytes; what the bytes mean, and whose key to believe, is decided elsewhere.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from isthmus.errors import BundleError, CertificateError

SIGNATURE_BYTES = 64


def read_public(path: Path) -> bytes:
    """The bytes of a file that anybody may read.

    Raises:
        CertificateError: the file is missing or unreadable.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(
            f"{path} is missing: point --certs at a folder made by `cloud_node certs issue`"
        ) from None
    except OSError as error:
        raise CertificateError(f"{path} cannot be read ({error.strerror}): check its owner and permissions") from error


def read_private(path: Path) -> bytes:
    """The bytes of a private key file.

    Raises:
        CertificateError: the file is missing or unreadable, or its group or everybody can reach it.
    """
    content = read_public(path)
    if path.stat().st_mode & 0o077:
        raise CertificateError(f"{path} is open to other users: run `chmod 600 {path}`")
    return content


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read an unencrypted Ed25519 private key (PKCS#8 PEM).

    Raises:
        CertificateError: the file is missing, open to other users or holds no such key.
    """
    content = read_private(path)
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{path} holds no readable private key: have the identity issued again") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CertificateError(f"{path} is not an Ed25519 key: have the identity issued again")
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """Read an Ed25519 public key (SubjectPublicKeyInfo PEM).

    Raises:
        CertificateError: the file is missing or holds no such key.
    """
    content = read_public(path)
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{path} holds no readable public key: have the identity issued again") from error
    if not isinstance(key, Ed25519PublicKey):
        raise CertificateError(f"{path} is not an Ed25519 key: have the identity issued again")
    return key


def sign(key: Ed25519PrivateKey, payload: bytes) -> bytes:
    """The 64-byte Ed25519 signature (RFC 8032) of `payload`."""
    return key.sign(payload)


def verify(key: Ed25519PublicKey, payload: bytes, signature: bytes) -> None:
    """Return if `signature` is the key's over `payload`.

    Raises:
        BundleError: it is not.
    """
    try:
        key.verify(signature, payload)
    except InvalidSignature:
        raise BundleError(
            "the signature is not the publisher's: fetch again, and check publisher.pub with the model owner"
        ) from None
