"""How identities are renewed and ended: rotation in place, revocation, and one authority after another.

Knows an authority's directory; what stands in it is made by `certificates`. Nothing that runs needs a restart: both
sides read their folders anew.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from isthmus.durable import write_whole
from isthmus.errors import CertificateError
from isthmus.trust import signing
from isthmus.trust.certificates import (
    authority_of,
    certify,
    identities,
    load_authority_key,
    load_certificate,
    private_pem,
    public_pem,
    replace_private,
    serials_of,
    trust,
)
from isthmus.trust.profiles import (
    AUTHORITY,
    DAYS,
    Usage,
    Wanted,
    authority_certificate,
    check_request,
    names_of,
    purposes_of,
)
from isthmus.trust.revocation import FILE, read_list, write_list

LOCK = ".lock"


def rotate(
    directory: Path,
    name: str,
    days: float = DAYS,
    hosts: Sequence[str] | None = None,
    revoke_old: bool = False,
    signing_key: bool = False,
) -> Path:
    """Give an identity a new TLS key and certificate, in place; the old one counts until it expires or is revoked.

    Args:
        directory: of the authority.
        name: of the identity, whose folder stands in `directory`.
        days: how long the new certificate is valid.
        hosts: DNS names, IP addresses and at most one SPIFFE URI; None: those of the old one.
        revoke_old: put the old certificate, and all before it, on the authority's list.
        signing_key: make a new signing key too; what the old one signed must then be checked with the old .pub.

    Raises:
        CertificateError: there is no such identity, or the request makes no sense.
    """
    authority, folder = authority_of(directory), directory / name
    if not (folder / "cert.pem").is_file() or name == AUTHORITY:
        raise CertificateError(f"{directory} has no identity {name!r}: `cloud_node certs list` names those it has")
    old = load_certificate(folder / "cert.pem")
    usage: Usage = "server" if ExtendedKeyUsageOID.SERVER_AUTH in purposes_of(old) else "client"
    names = tuple(hosts) if hosts is not None else names_of(old, name)
    check_request(name, names, usage, days)
    if signing_key and usage == "server":
        raise CertificateError("a server signs with the owner's own key, which stays: leave --signing-key out")
    if signing_key:
        fresh = Ed25519PrivateKey.generate()
        replace_private(folder / "signing.key", private_pem(fresh))
        write_whole(directory / AUTHORITY / "issued" / f"{name}.pub", public_pem(fresh.public_key()))
    before = serials_of(directory, name)
    certify(directory, authority, name, Wanted(names, usage, days))
    if revoke_old:
        revoke_serials(directory, before)
    return folder


def rotate_authority(directory: Path) -> None:
    """Make a new authority beside the old one: both are trusted until `retire_authority`.

    New certificates are of the new one. Every identity's ca.pem in `directory` names both from now on; those that were
    handed out must be handed out again before the server's own certificate is rotated.

    Raises:
        CertificateError: there is no authority, or one is being replaced already.
    """
    home = directory / AUTHORITY
    _take_back(home)
    authority_of(directory)
    old = signing.read_public(home / "ca.pem")
    if len(x509.load_pem_x509_certificates(old)) > 1:
        raise CertificateError("the authority is being replaced already: finish with `cloud_node certs retire` first")
    key = ec.generate_private_key(ec.SECP256R1())
    replace_private(home / "retiring.key", private_pem(load_authority_key(home / "ca.key")))
    replace_private(home / "ca.key", private_pem(key))
    trust(directory, authority_certificate(key).public_bytes(Encoding.PEM) + old)
    revoke_serials(directory, read_list(home, old))


def _take_back(home: Path) -> None:
    """Undo a rotation that died before the new authority's certificate was there: its key signs nothing yet."""
    kept = home / "retiring.key"
    if kept.exists() and (home / "ca.pem").exists():
        newest = x509.load_pem_x509_certificates(signing.read_public(home / "ca.pem"))[0]
        if load_authority_key(kept).public_key() == newest.public_key():
            kept.replace(home / "ca.key")


def retire_authority(directory: Path) -> None:
    """Trust the old authority no more; whoever still has a certificate of it is refused.

    Raises:
        CertificateError: none is being replaced, or an identity here still has a certificate of the old one.
    """
    home = directory / AUTHORITY
    newest, *others = x509.load_pem_x509_certificates(signing.read_public(home / "ca.pem"))
    if not others:
        raise CertificateError("no authority is being replaced: begin with `cloud_node certs rotate --name authority`")
    for folder in identities(directory):
        if load_certificate(folder / "cert.pem").issuer != newest.subject:
            raise CertificateError(f"{folder.name} has a certificate of the old authority: rotate it first")
    trust(directory, newest.public_bytes(Encoding.PEM))
    (home / "retiring.key").unlink(missing_ok=True)


def revoke(directory: Path, name: str) -> int:
    """Put every certificate that an identity was ever given on the authority's list; returns how many those are.

    The list is written to the authority's folder and to those of the servers in `directory`.

    Raises:
        CertificateError: there is no authority, or it knows no such identity.
    """
    authority_of(directory)
    serials = serials_of(directory, name)
    if not serials:
        raise CertificateError(f"no certificate was issued to {name!r}: `cloud_node certs list` names those that were")
    revoke_serials(directory, serials)
    return len(serials)


def revoke_serials(directory: Path, serials: Iterable[int]) -> None:
    """Put certificates on the list of what is revoked, and the list where servers read it; one process at a time."""
    home = directory / AUTHORITY
    with _alone(home):
        _revoke_serials(directory, home, serials)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Others that change the authority's list wait: what one has put on it the next must find there."""
    descriptor = os.open(home / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _revoke_serials(directory: Path, home: Path, serials: Iterable[int]) -> None:
    known = read_list(home, signing.read_public(home / "ca.pem"))
    key = load_authority_key(home / "ca.key")
    write_list(home / FILE, {*known, *serials}, load_certificate(home / "ca.pem"), key)
    for folder in identities(directory):
        if ExtendedKeyUsageOID.SERVER_AUTH in purposes_of(load_certificate(folder / "cert.pem")):
            write_whole(folder / FILE, (home / FILE).read_bytes())
