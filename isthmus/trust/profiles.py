"""What certificates say: profiles of an authority and its identities (RFC 5280), and what they may be called.

Knows X.509 and the SPIFFE ID standard; knows no files. TLS keys are ECDSA P-256, because gRPC's handshake refuses
Ed25519 leaves. An identity's name is a SPIFFE URI, one in each certificate.
"""

import ipaddress
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isthmus.errors import CertificateError

Usage = Literal["client", "server"]

AUTHORITY = "authority"
SPIFFE = "spiffe://"
OWN_DOMAIN = "isthmus"
"""The trust domain of identities that are given no other; whose names those are, this software says."""
LONGEST_URI = 2048
HOUR = 1 / 24
AUTHORITY_DAYS = 5 * 365
DAYS = 30
"""How long an identity is valid unless told otherwise; `rotate` renews it, and no process need be restarted."""
CLOCK_SKEW = timedelta(minutes=5)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")


@dataclass(frozen=True)
class Wanted:
    """What a certificate shall say."""

    hosts: tuple[str, ...]
    usage: Usage
    days: float


def check_request(name: str, hosts: Sequence[str], usage: Usage, days: float) -> None:
    """Refuse what no certificate can be given for.

    Raises:
        CertificateError: the name, a host or the days make no sense; the message says what would.
    """
    if not NAME.fullmatch(name) or name == AUTHORITY:
        raise CertificateError(
            f"name {name!r} cannot be used: take 1 to 63 of a-z, 0-9, '.', '_', '-', not {AUTHORITY!r}"
        )
    uris = [host for host in hosts if host.startswith(SPIFFE)]
    if usage == "server" and len(hosts) == len(uris):
        raise CertificateError("a server needs the hosts it is reached under: add --san HOST, once for each")
    if not HOUR <= days <= AUTHORITY_DAYS:
        raise CertificateError(f"{days:g} days cannot be granted: choose --days from an hour to {AUTHORITY_DAYS} days")
    if len(uris) > 1:
        raise CertificateError("a certificate has one SPIFFE URI: give --san spiffe://... once")
    for host in hosts:
        _spiffe_id(host) if host in uris else _host_name(host)


def _spiffe_id(uri: str) -> None:
    """Check a URI against the SPIFFE ID standard: a trust domain, and path segments that are neither empty nor dots."""
    domain, *segments = uri.removeprefix(SPIFFE).split("/")
    if domain == OWN_DOMAIN:
        raise CertificateError(f"{uri[:80]!r} is neither a host nor free: names of {OWN_DOMAIN} follow from --name")
    good = _DOMAIN.fullmatch(domain) and segments and len(uri) <= LONGEST_URI
    if not good or any(not _SEGMENT.fullmatch(part) or part in {".", ".."} for part in segments):
        raise CertificateError(
            f"{uri[:80]!r} is no SPIFFE ID: it is spiffe://DOMAIN/PATH, the domain of a-z, 0-9, '.', '_', '-', "
            "the path of letters, digits, '.', '_', '-' between slashes"
        )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host) or len(host) > 253:
            raise CertificateError(
                f"host {host!r} is neither a DNS name nor an IP address: give it bare, without scheme and port"
            ) from None
        return x509.DNSName(host)


def authority_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """A self-signed authority, which may sign identities and lists and nothing below them."""
    # The random suffix keeps the authorities of two owners apart in messages and in trust stores.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Isthmus authority {secrets.token_hex(4)}")])
    return (
        _builder(name, name, key.public_key(), key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def leaf(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    name: str,
    wanted: Wanted,
) -> x509.Certificate:
    """An identity's certificate: one side of a connection, one SPIFFE URI, and the hosts of a server."""
    client = wanted.usage == "client"
    purpose = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    own = [host for host in wanted.hosts if host.startswith(SPIFFE)]
    uri = own[0] if own else f"{SPIFFE}{OWN_DOMAIN}/{'edge' if client else 'cloud'}/{name}"
    hosts = [_host_name(host) for host in wanted.hosts if not host.startswith(SPIFFE)]
    return (
        _builder(subject, authority.subject, public_key, authority_key.public_key(), wanted.days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri), *hosts]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: float,
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


def purposes_of(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    """Which sides of a connection a certificate is for."""
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def names_of(certificate: x509.Certificate, name: str) -> tuple[str, ...]:
    """What a certificate is for, as --san has it, but for the name that every identity has."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    own = [uri for uri in uris if uri not in {f"{SPIFFE}{OWN_DOMAIN}/{side}/{name}" for side in ("edge", "cloud")}]
    addresses = names.get_values_for_type(x509.IPAddress)
    return (*own, *names.get_values_for_type(x509.DNSName), *map(str, addresses))
