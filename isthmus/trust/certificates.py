"""A small certificate authority: one per model owner, short-lived identities under it.

Knows where the files stand. Knows no transport and never reads an identity back: that is `credentials`. What
certificates say is in `profiles`; how they end, in `renewing`. Bundles are signed with Ed25519.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from isthmus.durable import write_whole
from isthmus.errors import CertificateError
from isthmus.trust import signing
from isthmus.trust.profiles import AUTHORITY, DAYS, NAME, Usage, Wanted, authority_certificate, check_request, leaf
from isthmus.trust.revocation import FILE

CERTIFICATES = "certificates"
"""In the authority's folder: every certificate that it gave, by name."""


def init_authority(directory: Path, hosts: Sequence[str] = ("localhost", "127.0.0.1"), days: float = DAYS) -> None:
    """Make an authority (valid 5 years) in `directory`, and a server identity for `hosts` beside it.

    Args:
        directory: gets `authority/` and `server/`.
        hosts: DNS names and IP addresses under which clients reach the server.
        days: how long the server's certificate is valid.

    Raises:
        CertificateError: an authority is already there, or a host or `days` makes no sense.
    """
    check_request("server", hosts, "server", days)
    home = directory / AUTHORITY
    if home.exists():
        raise CertificateError(f"{home} already exists: use it, or name another folder with --dir")
    key = ec.generate_private_key(ec.SECP256R1())
    publisher = Ed25519PrivateKey.generate()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.mkdir(mode=0o700)
    (home / "issued").mkdir(mode=0o700)
    write_private(home / "ca.key", private_pem(key))
    write_private(home / "publisher.key", private_pem(publisher))
    (home / "publisher.pub").write_bytes(public_pem(publisher.public_key()))
    (home / "ca.pem").write_bytes(authority_certificate(key).public_bytes(Encoding.PEM))
    issue(directory, "server", hosts, "server", days)


def issue(directory: Path, name: str, hosts: Sequence[str] = (), usage: Usage = "client", days: float = DAYS) -> Path:
    """Make the identity folder `directory/name`, signed by the authority in `directory`.

    The folder holds ca.pem, cert.pem, key.pem, signing.key and publisher.pub. A client signs with its own key; a
    server signs bundles with the publisher's. The identity's public signing key is kept in `authority/issued/`.

    Raises:
        CertificateError: the name is malformed or taken, a server has no hosts, a host or `days` makes no sense, or
            there is no authority.
    """
    check_request(name, hosts, usage, days)
    home, folder = directory / AUTHORITY, directory / name
    authority = authority_of(directory)
    if folder.exists():
        raise CertificateError(f"{folder} already exists: choose another --name, or renew it with `certs rotate`")
    publisher = signing.load_private(home / "publisher.key")
    signing_key = publisher if usage == "server" else Ed25519PrivateKey.generate()
    folder.mkdir(mode=0o700)
    write_private(folder / "signing.key", private_pem(signing_key))
    (folder / "publisher.pub").write_bytes(public_pem(publisher.public_key()))
    (home / "issued" / f"{name}.pub").write_bytes(public_pem(signing_key.public_key()))
    certify(directory, authority, name, Wanted(tuple(hosts), usage, days))
    return folder


def serials_of(directory: Path, name: str) -> list[int]:
    """Serial numbers of the certificates that an identity was given."""
    kept = directory / AUTHORITY / CERTIFICATES / name
    found = [load_certificate(path) for path in sorted(kept.glob("*.pem"))] if NAME.fullmatch(name) else []
    shown = directory / name / "cert.pem"  # of an authority made before certificates were kept
    if NAME.fullmatch(name) and shown.is_file():
        found.append(load_certificate(shown))
    return list(dict.fromkeys(certificate.serial_number for certificate in found))


def identities(directory: Path) -> list[Path]:
    """Folders of the identities in an authority's directory."""
    return sorted(path.parent for path in directory.glob("*/cert.pem") if path.parent.name != AUTHORITY)


def authority_of(directory: Path) -> x509.Certificate:
    """The certificate that a directory's authority signs with.

    Raises:
        CertificateError: there is no authority.
    """
    home = directory / AUTHORITY
    if not home.is_dir():
        raise CertificateError(f"{directory} has no authority: run `cloud_node certs init --dir {directory}` first")
    return load_certificate(home / "ca.pem")


def certify(directory: Path, authority: x509.Certificate, name: str, wanted: Wanted) -> None:
    """Put a new key and certificate into an identity's folder, and keep the certificate with the authority.

    Two files cannot change at once: whoever reads between them finds that they do not belong together, and reads again.
    """
    home, folder, key = directory / AUTHORITY, directory / name, ec.generate_private_key(ec.SECP256R1())
    certificate = leaf(authority, load_authority_key(home / "ca.key"), key.public_key(), name, wanted)
    content = certificate.public_bytes(Encoding.PEM)
    kept = home / CERTIFICATES / name
    for each in (kept.parent, kept):
        each.mkdir(mode=0o700, exist_ok=True)
    write_whole(kept / f"{certificate.serial_number:040x}.pem", content)
    write_whole(folder / "ca.pem", signing.read_public(home / "ca.pem"))
    if wanted.usage == "server" and (home / FILE).exists():
        write_whole(folder / FILE, (home / FILE).read_bytes())
    replace_private(folder / "key.pem", private_pem(key))
    write_whole(folder / "cert.pem", content)


def trust(directory: Path, authorities: bytes) -> None:
    """Let the authority and all identities here trust these certificates (PEM), the one that issues first."""
    for folder in (directory / AUTHORITY, *identities(directory)):
        write_whole(folder / "ca.pem", authorities)


def load_certificate(path: Path) -> x509.Certificate:
    """The first certificate in a file.

    Raises:
        CertificateError: it holds none.
    """
    try:
        return x509.load_pem_x509_certificate(signing.read_public(path))
    except ValueError as error:
        raise CertificateError(f"{path} is no readable certificate: restore it from a backup") from error


def load_authority_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key that an authority signs with.

    Raises:
        CertificateError: it is missing, open to others or no such key.
    """
    try:
        key = load_pem_private_key(signing.read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{path} is no readable private key: restore it from a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path} is not an ECDSA key: restore it from a backup")
    return key


def private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """A private key as PKCS#8, without a passphrase: the file's mode guards it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: Ed25519PublicKey) -> bytes:
    """A public key as SubjectPublicKeyInfo."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def write_private(path: Path, content: bytes) -> None:
    """Make a file that its owner alone reads, whole or not at all.

    Raises:
        FileExistsError: there is one.
        OSError: the disk refuses.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        replace_private(path, content)
    except BaseException:
        path.unlink(missing_ok=True)  # it holds nothing, and would stand in the way of another try
        raise


def replace_private(path: Path, content: bytes) -> None:
    """Replace such a file, whole or not at all."""
    write_whole(path, content, mode=0o600)
