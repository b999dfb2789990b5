"""What `doctor` looks at between here and the server: its name, its port, the handshake, its certificate.

Knows sockets and TLS; knows nothing of what is served.
"""

import socket
import time

from edge_client.doctor_here import expiring
from edge_client.examined import Patient, Verdict
from isthmus.errors import UnreachableError
from isthmus.trust import credentials
from isthmus.trust.proxy import connect, proxy_for

WITHIN_S = 5.0


def name(patient: Patient) -> Verdict:
    """Whether the host's name resolves.

    Raises:
        UnreachableError: it does not.
    """
    try:
        found = socket.getaddrinfo(patient.host, patient.port, type=socket.SOCK_STREAM)
    except OSError:
        if proxy_for(patient.host) is not None:
            return Verdict("warn", f"{patient.host} does not resolve here; the proxy may know it")
        raise UnreachableError(
            f"host name {patient.host!r} does not resolve: check its spelling, and the DNS of this network"
        ) from None
    addresses = list(dict.fromkeys(str(place[0]) for *_, place in found))
    return Verdict("pass", f"{patient.host} is {', '.join(addresses)}")


def connection(patient: Patient) -> Verdict:
    """Whether something takes a TCP connection there.

    Raises:
        UnreachableError: nothing does, or a proxy or firewall is between.
    """
    began = time.perf_counter()
    try:
        connect(patient.host, patient.port, WITHIN_S).close()
    except ConnectionRefusedError:
        raise UnreachableError(
            f"nothing listens at {patient.server}: check the port, and that `cloud_node serve` is running"
        ) from None
    except TimeoutError:
        raise UnreachableError(
            f"{patient.server} did not answer within {WITHIN_S:g} s: check the address, and the firewalls between"
        ) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise UnreachableError(
            f"{patient.server} cannot be reached ({why}): check the network, and the proxy if there is one"
        ) from None
    spent = time.perf_counter() - began
    return Verdict("pass", f"{patient.server} takes connections, in {1e3 * spent:.1f} ms", {"connect_s": spent})


def handshake(patient: Patient) -> Verdict:
    """Whether both sides speak TLS, or both do not, and know each other's authority.

    Raises:
        CertificateError, UnreachableError: as `diagnose` finds it.
    """
    found = credentials.diagnose(patient.host, patient.port, patient.credentials, WITHIN_S)
    if found is not None:
        raise found
    if patient.credentials is None:
        return Verdict("pass", "the server speaks plaintext, as was asked for")
    return Verdict("pass", "both sides know each other's authority, and the certificate is for this name")


def certificate(patient: Patient) -> Verdict:
    """Whether the server's certificate will be valid for long."""
    if patient.credentials is None:
        return Verdict("skip", "there is none in plaintext")
    try:
        shown = credentials.served_certificate(patient.host, patient.port, patient.credentials, WITHIN_S)
    except OSError as error:
        raise UnreachableError(f"{patient.server} broke the second handshake ({error}): try again") from None
    until = shown.not_valid_after_utc.timestamp()
    return expiring("the server's", until, "tell its owner to rotate it, or no edge will get in")
