"""Public keys of an attempt, signed: whose each is, as the authority's certificates say, and whether they are enough.

Knows certificates and signatures; knows no masks. The key that signs is that of the edge's certificate (ECDSA P-256):
the authority's signature on the certificate binds it to the identity; nothing that edges have binds an Ed25519 key.
"""

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from isthmus.errors import CertificateError, LimitError, WireError
from isthmus.rounds.limits import FEWEST
from isthmus.rounds.masks import Attempt
from isthmus.trust.credentials import Credentials
from isthmus.trust.profiles import SPIFFE, purposes_of
from isthmus.wire.gen import backbone_pb2 as pb

KEY_BYTES: Final = 32
_PURPOSE = b"isthmus round key v1"


def signed(credentials: Credentials, name: str, attempt: Attempt, terms: bytes, public: bytes) -> pb.RoundKey:
    """A public key (X25519, 32 bytes) for an attempt, with this edge's certificate and signature.

    Raises:
        CertificateError: the identity's key cannot sign.
    """
    certificate = x509.load_pem_x509_certificate(credentials.certificate)
    key = load_pem_private_key(credentials.key, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{credentials.directory / 'key.pem'} is no ECDSA key: have the identity issued again")
    said = _said(_identity(certificate), name, attempt, terms, public)
    return pb.RoundKey(
        name=name,
        run=attempt.run,
        round=attempt.round,
        attempt=attempt.number,
        public_key=public,
        certificate=certificate.public_bytes(Encoding.DER),
        signature=key.sign(said, ec.ECDSA(SHA256())),
    )


def identity_of(credentials: Credentials) -> str:
    """The name of an identity, as its certificate has it.

    Raises:
        CertificateError: it has none.
    """
    return _identity(x509.load_pem_x509_certificate(credentials.certificate))


def checked(key: pb.RoundKey, authorities: bytes, name: str, attempt: Attempt, terms: bytes) -> str:
    """Whose a key is.

    Args:
        key: as it came.
        authorities: the certificates (PEM) to believe.
        name: of the run, as --join has it.
        attempt: that it must be for.
        terms: digest of what all edges agree on.

    Raises:
        CertificateError: the certificate is not an authority's, has ended, or is none of an edge.
        WireError: the signature is not the certificate's over these.
    """
    try:
        certificate = x509.load_der_x509_certificate(key.certificate)
        believed = x509.load_pem_x509_certificates(authorities)
        public = certificate.public_key()
        _check_issued(certificate, believed)
        identity = _identity(certificate)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound):
        raise CertificateError("an edge of this round shows no certificate; ask the model owner which") from None
    if len(key.public_key) != KEY_BYTES or not isinstance(public, ec.EllipticCurvePublicKey):
        raise WireError(f"the round's key of {identity} is none of this protocol; match the versions")
    try:
        public.verify(key.signature, _said(identity, name, attempt, terms, key.public_key), ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise WireError(f"the round's key of {identity} is not signed by it for this attempt; take no part") from None
    return identity


def require_cohort(identities: Iterable[str], fewest: int) -> None:
    """See that there are enough edges, each once.

    Raises:
        WireError: one is there twice.
        LimitError: there are fewer than `fewest`, or than any round may have.
    """
    all_of, least = list(identities), max(FEWEST, fewest)
    if len(set(all_of)) < len(all_of):
        raise WireError("an edge stands twice in this round; take no part, and ask the model owner")
    if len(all_of) < least:
        raise LimitError(f"{len(all_of)} edges are too few for a sum that hides each: this round needs {least}")


def roster_of(keys: Iterable[pb.RoundKey]) -> bytes:
    """SHA-256 over all keys of an attempt, whatever their order."""
    parts = sorted(hashlib.sha256(key.certificate).digest() + key.public_key for key in keys)
    return hashlib.sha256(b"".join(parts)).digest()


def terms_digest(terms: pb.RoundTerms, start: bytes) -> bytes:
    """SHA-256 of what all edges agree on."""
    return hashlib.sha256(terms.SerializeToString(deterministic=True) + b"\0" + start).digest()


def _said(identity: str, name: str, attempt: Attempt, terms: bytes, public: bytes) -> bytes:
    return _PURPOSE + attempt.bound(name.encode(), identity.encode(), terms, public)


def _check_issued(certificate: x509.Certificate, believed: list[x509.Certificate]) -> None:
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise CertificateError("the certificate of an edge of this round has ended; it must be rotated")
    if ExtendedKeyUsageOID.CLIENT_AUTH not in purposes_of(certificate):
        raise CertificateError("a server's certificate stands in this round; take no part, and ask the model owner")
    for authority in believed:
        try:
            certificate.verify_directly_issued_by(authority)
        except (InvalidSignature, ValueError, TypeError):
            continue
        return
    raise CertificateError("an edge of this round is of another authority; take no part, and ask the model owner")


def _identity(certificate: x509.Certificate) -> str:
    """The one SPIFFE URI of a certificate."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith(SPIFFE)]
    if len(uris) != 1:
        raise CertificateError("a certificate has no single SPIFFE URI; have the identity issued again")
    return uris[0]
