"""An identity folder as the transport needs it, who a peer is, and why a TLS connection failed.

Knows files, gRPC's credential types and one handshake. Knows nothing about what is said once connected, and makes
no certificates.
"""

import hashlib
import socket
import ssl
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from isthmus.errors import CertificateError, IsthmusError, UnreachableError
from isthmus.trust import proxy, signing

_PREFIX = b"spiffe://"
# Verification results of OpenSSL (x509_vfy.h), which the ssl module passes on as bare numbers.
_NOT_YET_VALID, _EXPIRED, _HOST_MISMATCH, _ADDRESS_MISMATCH = 9, 10, 62, 64


@dataclass(frozen=True)
class Credentials:
    """An identity: the authority it trusts, its certificate and its TLS key, all PEM.

    The folder's signing.key and publisher.pub are read when asked for.
    """

    ca: bytes
    certificate: bytes
    key: bytes
    directory: Path

    def __repr__(self) -> str:
        """The folder alone, so that no log ever shows the key."""
        return f"Credentials({str(self.directory)!r})"

    @classmethod
    def load(cls, directory: Path) -> "Credentials":
        """Read and check the folder that `certificates.issue` made.

        Raises:
            CertificateError: a file is missing, unreadable, expired or open to other users, or the key belongs to
                another certificate.
        """
        loaded = cls(
            ca=signing.read_public(directory / "ca.pem"),
            certificate=signing.read_public(directory / "cert.pem"),
            key=signing.read_private(directory / "key.pem"),
            directory=directory,
        )
        certificate = _parse(loaded.certificate, directory / "cert.pem")
        for parsed, name in ((_parse(loaded.ca, directory / "ca.pem"), "ca.pem"), (certificate, "cert.pem")):
            _check_dates(parsed, directory / name)
        if _public_of(loaded.key, directory / "key.pem") != certificate.public_key():
            raise CertificateError(
                f"{directory / 'key.pem'} does not belong to cert.pem beside it: copy the whole folder again"
            )
        return loaded

    def fresh(self) -> "Credentials":
        """The same folder as it is now; as it was, where it cannot be read, as while it is being rotated."""
        with suppress(CertificateError):
            return Credentials.load(self.directory)
        return self

    def channel(self) -> grpc.ChannelCredentials:
        """For a client: trusts only this authority and shows this certificate."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)

    def server(self) -> grpc.ServerCredentials:
        """For a server: clients without a certificate of this authority are refused.

        The folder is looked at before each handshake, so that a rotated certificate serves from then on.
        """
        known = self

        def configuration() -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(known.key, known.certificate)], known.ca)

        def fetch() -> grpc.ServerCertificateConfiguration:
            nonlocal known
            known = known.fresh()
            return configuration()

        return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=True)

    def expires(self) -> float:
        """When the certificate does, in seconds since 1970."""
        return _parse(self.certificate, self.directory / "cert.pem").not_valid_after_utc.timestamp()

    def publisher(self) -> Ed25519PublicKey:
        """The key that bundles of this authority's owner are signed with.

        Raises:
            CertificateError: publisher.pub is missing or unreadable.
        """
        return signing.load_public(self.directory / "publisher.pub")

    def signing_key(self) -> Ed25519PrivateKey:
        """The key that this identity signs with.

        Raises:
            CertificateError: signing.key is missing, unreadable or open to other users.
        """
        return signing.load_private(self.directory / "signing.key")


def load_signer(path: Path) -> Ed25519PublicKey:
    """The public key that an edge's submissions are signed with, from the file that `certificates.issue` left of it.

    Raises:
        CertificateError: there is no such file, or it holds no such key.
    """
    try:
        return signing.load_public(path)
    except CertificateError:
        wrong = "holds no public key that signs" if path.is_file() else "is no file"
        raise CertificateError(
            f"{path} {wrong}: name the key of the edge that submitted, --signer certs/authority/issued/NAME.pub"
        ) from None


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 in hex of a signing key's 32 bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def peer_identity(auth_context: Mapping[str, Iterable[bytes]]) -> str:
    """Who called, from `ServicerContext.auth_context()`.

    Returns:
        The SPIFFE URI of the peer's certificate, `cn:NAME` if it has none or several, `anonymous` for a plaintext peer.
    """
    names = auth_context.get("x509_subject_alternative_name", ())
    uris = [name.decode("utf-8", "replace") for name in names if name.startswith(_PREFIX)]
    if len(uris) == 1:
        return uris[0]
    for name in auth_context.get("x509_common_name", ()):
        return "cn:" + name.decode("utf-8", "replace")
    return "anonymous"


def peer_serial(auth_context: Mapping[str, Iterable[bytes]]) -> int | None:
    """The serial number of the caller's certificate; None for a plaintext peer."""
    for content in auth_context.get("x509_pem_cert", ()):
        return x509.load_pem_x509_certificate(content).serial_number
    return None


def peer_certificate(auth_context: Mapping[str, Iterable[bytes]]) -> str:
    """SHA-256 in hex of the caller's certificate (DER); empty for a plaintext peer."""
    for content in auth_context.get("x509_pem_cert", ()):
        return x509.load_pem_x509_certificate(content).fingerprint(hashes.SHA256()).hex()
    return ""


def diagnose(host: str, port: int, credentials: Credentials | None, timeout_s: float = 5.0) -> IsthmusError | None:
    """Find out why gRPC calls a server UNAVAILABLE, by making one handshake outside gRPC.

    Args:
        host: the server's name, as the channel dialled it.
        port: the server's port.
        credentials: what the channel used; None for plaintext.
        timeout_s: patience for each network step, in seconds.

    Returns:
        UnreachableError where trying again can help, CertificateError where it cannot, None when all is well.
    """
    place = f"{host}:{port}"
    try:
        if credentials is None:
            return _diagnose_plaintext(host, port, timeout_s)
        return _diagnose_tls(host, port, credentials, timeout_s)
    except socket.gaierror:
        return UnreachableError(f"host name {host!r} does not resolve: check its spelling and the network")
    except ConnectionRefusedError:
        return UnreachableError(f"nothing listens at {place}: check the port, and that `cloud_node serve` is running")
    except TimeoutError:
        return UnreachableError(f"{place} did not answer within {timeout_s:g} s: check the address and the firewall")
    except OSError as error:
        return UnreachableError(f"{place} cannot be reached ({error.strerror or error}): check the network")


def _diagnose_plaintext(host: str, port: int, timeout_s: float) -> IsthmusError | None:
    try:
        _handshake(host, port, _context(None), timeout_s)
    except ConnectionResetError:
        return None
    except ssl.SSLError as error:
        # Half an answer of a server that goes down is no TLS either; one that speaks it refuses by an alert.
        if "ALERT" not in (error.reason or ""):
            return None
    return CertificateError(f"{host}:{port} wants TLS: give the folder that the model owner issued with --certs DIR")


def _diagnose_tls(host: str, port: int, credentials: Credentials, timeout_s: float) -> IsthmusError | None:
    context = _context(credentials)
    try:
        # A server that is just going down closes the connection too, but not twice.
        if any(_handshake(host, port, context, timeout_s) for _ in range(2)):
            return None
    except ssl.SSLCertVerificationError as error:
        return _server_refused(host, port, credentials, timeout_s, error)
    except ssl.SSLEOFError:
        return UnreachableError(f"{host}:{port} closed the connection in mid-handshake: try again shortly")
    except ssl.SSLError as error:
        if _is_plaintext(error):
            return CertificateError(
                f"{host}:{port} speaks plaintext though certificates were given: start the server with --certs, "
                "or pass --insecure here"
            )
    return _own_refused(credentials)


def _handshake(host: str, port: int, context: ssl.SSLContext, timeout_s: float) -> bool:
    """Whether the server, after the handshake, spoke first as a gRPC server does.

    With TLS 1.3 a client's certificate is judged after the client's side of the handshake is done, so that a refusal
    shows at the first read: as an alert, or (gRPC) as a closed connection.
    """
    with (
        proxy.connect(host, port, timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        try:
            return bool(secure.recv(1))
        except ConnectionResetError:
            return False


def _context(credentials: Credentials | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if credentials is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(credentials.directory / "ca.pem")
        context.load_cert_chain(credentials.directory / "cert.pem", credentials.directory / "key.pem")
    return context


def _is_plaintext(error: ssl.SSLError) -> bool:
    # Older and newer OpenSSL name a reply that is no TLS record differently.
    return error.reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}


def _server_refused(
    host: str, port: int, credentials: Credentials, timeout_s: float, error: ssl.SSLCertVerificationError
) -> CertificateError:
    place = f"{host}:{port}"
    if error.verify_code == _EXPIRED:
        return CertificateError(f"the certificate of {place} has expired: ask the model owner to issue it anew")
    if error.verify_code == _NOT_YET_VALID:
        return CertificateError(f"the certificate of {place} is not valid yet: check this machine's clock")
    if error.verify_code in {_HOST_MISMATCH, _ADDRESS_MISMATCH}:
        names = ", ".join(_served_names(host, port, credentials, timeout_s)) or "no host"
        return CertificateError(
            f"the certificate of {place} is for {names}: dial one of these, or have it issued with --san {host}"
        )
    return CertificateError(
        f"the certificate of {place} is not from the authority in {credentials.directory / 'ca.pem'}: "
        "check the address, or ask its owner for an identity of that server's authority"
    )


def served_certificate(host: str, port: int, credentials: Credentials, timeout_s: float = 5.0) -> x509.Certificate:
    """The certificate that a server of the same authority shows, whatever host it is for.

    Raises:
        OSError: none is to be had; ssl.SSLError is one.
    """
    context = _context(credentials)
    context.check_hostname = False
    with (
        proxy.connect(host, port, timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")


def _served_names(host: str, port: int, credentials: Credentials, timeout_s: float) -> list[str]:
    certificate = served_certificate(host, port, credentials, timeout_s)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]


def _own_refused(credentials: Credentials) -> CertificateError:
    path = credentials.directory / "cert.pem"
    certificate = _parse(credentials.certificate, path)
    try:
        _check_dates(certificate, path)
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except CertificateError as error:
        return error
    except x509.ExtensionNotFound:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    if ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
        return CertificateError(f"the server refused {path}, a server's certificate: use one issued for a client")
    return CertificateError(
        f"the server refused {path}: ask the model owner for an identity of that server's authority"
    )


def _parse(content: bytes, path: Path) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(content)
        certificate.public_key(), certificate.extensions
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{path} is no readable certificate: copy the whole folder again") from error
    return certificate


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise CertificateError(
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: ask the model owner to issue a new one"
        )
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{path} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: check the clock"
        )


def _public_of(key: bytes, path: Path) -> PublicKeyTypes:
    try:
        return load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{path} is no readable private key: copy the whole folder again") from error
