"""Which certificates of an authority no longer count: its list of revoked ones (a CRL, RFC 5280 section 5).

Knows X.509 lists and one file; what becomes of a connection is decided by whoever asks. gRPC's Python API takes no
list, so a server asks at each call. Whoever holds the file's folder may hold the list back; so it goes to a server as
its certificate does.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from isthmus.durable import write_whole
from isthmus.errors import CertificateError
from isthmus.trust import signing

FILE = "crl.pem"
VALID = timedelta(days=5 * 365)
"""A list is valid until the next; it is replaced at each revocation, not by the calendar."""


def write_list(
    path: Path, serials: Iterable[int], authority: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> None:
    """Write the list of these serial numbers, signed by the authority."""
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.subject)
    builder = builder.last_update(now).next_update(now + VALID)
    for serial in sorted(set(serials)):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(entry)
    write_whole(path, builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


def read_list(folder: Path, authorities: bytes) -> frozenset[int]:
    """The serial numbers in a folder's list; none where there is no list.

    Args:
        folder: of an identity, or of the authority.
        authorities: certificates (PEM) of which one must have signed the list.

    Raises:
        CertificateError: there is a list, and it is damaged or another's: nobody can be let in by it.
    """
    path = folder / FILE
    if not path.exists():
        return frozenset()
    wrong = CertificateError(f"{path} is no list of this authority's: copy it anew from the authority's folder")
    try:
        found = x509.load_pem_x509_crl(signing.read_public(path))
        keys = [each.public_key() for each in x509.load_pem_x509_certificates(authorities)]
        if not any(isinstance(key, ec.EllipticCurvePublicKey) and found.is_signature_valid(key) for key in keys):
            raise wrong
        return frozenset(entry.serial_number for entry in found)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise wrong from None
