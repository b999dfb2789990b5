"""A small certificate authority: one per model owner, short-lived identities under it.

Knows X.509 and where the files stand. Knows no transport and never reads an identity back: that is
`credentials`. TLS keys are ECDSA P-256, because gRPC's handshake refuses Ed25519 leaves; bundles are signed
with Ed25519. Profiles follow RFC 5280; an identity's name is a SPIFFE URI.
"""

import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isthmus.errors import CertificateError
from isthmus.trust import signing

Usage = Literal["client", "server"]

AUTHORITY = "authority"
AUTHORITY_DAYS = 5 * 365
CLOCK_SKEW = timedelta(minutes=5)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")


def init_authority(directory: Path, hosts: Sequence[str] = ("localhost", "127.0.0.1"), days: int = 30) -> None:
    """Make an authority (valid 5 years) in `directory`, and a server identity for `hosts` beside it.

    Args:
        directory: gets `authority/` and `server/`.
        hosts: DNS names and IP addresses under which clients reach the server.
        days: how long the server's certificate is valid.

    Raises:
        CertificateError: an authority is already there, or a host or `days` makes no sense.
    """
    _check_request("server", hosts, "server", days)
    home = directory / AUTHORITY
    if home.exists():
        raise CertificateError(f"{home} already exists: use it, or name another folder with --dir")
    key = ec.generate_private_key(ec.SECP256R1())
    publisher = Ed25519PrivateKey.generate()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.mkdir(mode=0o700)
    (home / "issued").mkdir(mode=0o700)
    _write_private(home / "ca.key", _private_pem(key))
    _write_private(home / "publisher.key", _private_pem(publisher))
    (home / "publisher.pub").write_bytes(_public_pem(publisher.public_key()))
    (home / "ca.pem").write_bytes(_authority_certificate(key).public_bytes(Encoding.PEM))
    issue(directory, "server", hosts, "server", days)


def issue(directory: Path, name: str, hosts: Sequence[str] = (), usage: Usage = "client", days: int = 30) -> Path:
    """Make the identity folder `directory/name`, signed by the authority in `directory`.

    The folder holds ca.pem, cert.pem, key.pem, signing.key and publisher.pub. A client signs with its own key; a
    server signs bundles with the publisher's. The identity's public signing key is kept in `authority/issued/`.

    Raises:
        CertificateError: the name is malformed or taken, a server has no hosts, a host or `days` makes no sense, or
            there is no authority.
    """
    _check_request(name, hosts, usage, days)
    home, folder = directory / AUTHORITY, directory / name
    if not home.is_dir():
        raise CertificateError(f"{directory} has no authority: run `cloud_node certs init --dir {directory}` first")
    if folder.exists():
        raise CertificateError(f"{folder} already exists: choose another --name, or remove the folder to issue it anew")
    authority = _load_certificate(home / "ca.pem")
    publisher = signing.load_private(home / "publisher.key")
    signing_key = publisher if usage == "server" else Ed25519PrivateKey.generate()
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _leaf(authority, _load_authority_key(home / "ca.key"), key.public_key(), name, hosts, usage, days)
    folder.mkdir(mode=0o700)
    _write_private(folder / "key.pem", _private_pem(key))
    _write_private(folder / "signing.key", _private_pem(signing_key))
    (folder / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "ca.pem").write_bytes(authority.public_bytes(Encoding.PEM))
    (folder / "publisher.pub").write_bytes(_public_pem(publisher.public_key()))
    (home / "issued" / f"{name}.pub").write_bytes(_public_pem(signing_key.public_key()))
    return folder


def _check_request(name: str, hosts: Sequence[str], usage: Usage, days: int) -> None:
    if not _NAME.fullmatch(name) or name == AUTHORITY:
        raise CertificateError(
            f"name {name!r} cannot be used: take 1 to 63 of a-z, 0-9, '.', '_', '-', not {AUTHORITY!r}"
        )
    if usage == "server" and not hosts:
        raise CertificateError("a server needs the hosts it is reached under: add --san HOST, once for each")
    if not 1 <= days <= AUTHORITY_DAYS:
        raise CertificateError(f"{days} days cannot be granted: choose --days from 1 to {AUTHORITY_DAYS}")
    for host in hosts:
        _host_name(host)


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host) or len(host) > 253:
            raise CertificateError(
                f"host {host!r} is neither a DNS name nor an IP address: give it bare, without scheme and port"
            ) from None
        return x509.DNSName(host)


def _authority_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    # The random suffix keeps the authorities of two owners apart in messages and in trust stores.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Isthmus authority {secrets.token_hex(4)}")])
    return (
        _builder(name, name, key.public_key(), key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _leaf(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    name: str,
    hosts: Sequence[str],
    usage: Usage,
    days: int,
) -> x509.Certificate:
    side, purpose = (
        ("edge", ExtendedKeyUsageOID.CLIENT_AUTH) if usage == "client" else ("cloud", ExtendedKeyUsageOID.SERVER_AUTH)
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = [x509.UniformResourceIdentifier(f"spiffe://isthmus/{side}/{name}"), *map(_host_name, hosts)]
    return (
        _builder(subject, authority.subject, public_key, authority_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _key_usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(signing.read_public(path))
    except ValueError as error:
        raise CertificateError(f"{path} is no readable certificate: restore it from a backup") from error


def _load_authority_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(signing.read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{path} is no readable private key: restore it from a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path} is not an ECDSA key: restore it from a backup")
    return key


def _private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
