"""Lines that cannot be opened: each fails at once, with a remedy and an exit code of its own, and harms nobody else."""

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cloud_node.calls import Limits
from edge_client.assemble import connect
from edge_client.config import TrainConfig
from edge_client.link import Link
from edge_client.stream import open_channel
from isthmus import PROTOCOL
from isthmus.errors import CertificateError, IsthmusError, UnreachableError, VersionError, WireError
from isthmus.ledger.record import Ledger
from isthmus.trust import certificates, signing
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from isthmus.wire.status import read_status
from tests.bad_input.raw import RawStream, describe, identity, opening
from tests.harness import Server

PATIENCE_S = 600.0
"""Far beyond the test's own limit, so that whatever waits for it fails the test."""

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another owner's authority."""
    directory = tmp_path_factory.mktemp("stranger")
    certificates.init_authority(directory)
    certificates.issue(directory, "alice")
    return directory


@pytest.fixture
def open_session(rows: Path, cache: Path) -> Callable[..., None]:
    """Open a session as `edge_client train` does, and end it."""

    def go(address: str, certs: Path | None) -> None:
        config = TrainConfig(method="split", data=rows, server=address, certs=certs, patience=PATIENCE_S)
        connect(config, Ledger(), lambda *_: None).close()

    return go


@pytest.fixture(autouse=True)
def server_stays_up(guarded: Server, owner: Path) -> Iterator[None]:
    """Whatever a test does, the server still answers another edge afterwards."""
    yield
    assert describe(guarded.address, identity(owner, "alice")).protocol == PROTOCOL


def refused(kind: type[IsthmusError], *words: str, go: Callable[..., None], address: str, certs: Path | None) -> None:
    with pytest.raises(kind) as caught:
        go(address, certs)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_good_identity_opens_a_session(guarded: Server, owner: Path, open_session: Callable[..., None]) -> None:
    open_session(guarded.address, owner / "alice")


def test_a_node_of_another_signer_on_the_same_cache_leaves_the_ends_as_signed(
    guarded: Server, servers: dict[str, Server], owner: Path
) -> None:
    alice = identity(owner, "alice")
    for server, credentials in ((guarded, alice), (servers["llama"], None), (guarded, alice)):
        bundle = describe(server.address, credentials).cuts[0].ends_bundle
        with open_channel(server.address, credentials) as channel:
            stub = pb_grpc.BackboneStub(channel)  # type: ignore[no-untyped-call]
            first = next(stub.FetchEnds(pb.FetchRequest(bundle=bundle)))
        if credentials is not None:
            signing.verify(alice.publisher(), first.manifest, first.signature)


def test_an_identity_of_another_authority_is_refused(
    guarded: Server, owner: Path, stranger: Path, tmp_path: Path, open_session: Callable[..., None]
) -> None:
    mixed = Path(shutil.copytree(stranger / "alice", tmp_path / "mixed"))
    shutil.copy(owner / "alice" / "ca.pem", mixed / "ca.pem")
    refused(CertificateError, "the server refused", "authority", go=open_session, address=guarded.address, certs=mixed)


def test_a_server_of_another_authority_is_refused(
    guarded: Server, stranger: Path, open_session: Callable[..., None]
) -> None:
    where = stranger / "alice"
    refused(
        CertificateError, "is not from the authority", str(where), go=open_session, address=guarded.address, certs=where
    )


def test_a_server_certificate_is_no_client(guarded: Server, owner: Path, open_session: Callable[..., None]) -> None:
    where = owner / "server"
    refused(CertificateError, "a server's certificate", go=open_session, address=guarded.address, certs=where)


def test_an_expired_certificate_is_refused_before_and_by_the_server(
    guarded: Server, owner: Path, tmp_path: Path, open_session: Callable[..., None]
) -> None:
    folder = expired(owner, "alice", tmp_path / "expired")
    refused(CertificateError, "expired on", "issue", go=open_session, address=guarded.address, certs=folder)
    parts = [(folder / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")]
    with pytest.raises(grpc.RpcError) as caught:  # an edge that does not look at dates itself
        describe(guarded.address, Credentials(*parts, folder))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def expired(owner: Path, name: str, folder: Path) -> Path:
    """A copy of an identity whose certificate, signed by the same authority for the same key, ended yesterday."""
    shutil.copytree(owner / name, folder)
    good = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())
    authority = owner / "authority"
    signer = load_pem_private_key((authority / "ca.key").read_bytes(), password=None)
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer_name=good.issuer,
        subject_name=good.subject,
        public_key=good.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=2),
        not_valid_after=now - timedelta(days=1),
        extensions=list(good.extensions),
    )
    certificate = builder.sign(signer, hashes.SHA256())  # type: ignore[arg-type]
    (folder / "cert.pem").write_bytes(certificate.public_bytes(certificates.Encoding.PEM))
    return folder


def test_no_certificate_against_a_server_with_tls(guarded: Server, open_session: Callable[..., None]) -> None:
    refused(CertificateError, "wants TLS", "--certs DIR", go=open_session, address=guarded.address, certs=None)


def test_certificates_against_a_server_without_tls(
    servers: dict[str, Server], owner: Path, open_session: Callable[..., None]
) -> None:
    words = ("speaks plaintext", "--certs", "--insecure")
    refused(CertificateError, *words, go=open_session, address=servers["llama"].address, certs=owner / "alice")


def test_a_host_that_the_certificate_does_not_name(
    guarded: Server, owner: Path, open_session: Callable[..., None]
) -> None:
    address = guarded.address.replace("127.0.0.1", "127.0.0.2")
    with listening_too(guarded.address, "127.0.0.2"):
        words = ("is for localhost, 127.0.0.1", "--san 127.0.0.2")
        refused(CertificateError, *words, go=open_session, address=address, certs=owner / "alice")


@contextmanager
def listening_too(address: str, host: str) -> Iterator[None]:
    """Carry bytes from `host`, same port, to `address`: a server that answers under a name it was not issued for."""
    there, _, port = address.rpartition(":")
    with socket.create_server((host, int(port))) as listener:
        threading.Thread(target=_carry, args=(listener, (there, int(port))), daemon=True).start()
        yield


def _carry(listener: socket.socket, target: tuple[str, int]) -> None:
    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            sink.close()

    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        far = socket.create_connection(target)
        for pair in ((near, far), (far, near)):
            threading.Thread(target=pump, args=pair, daemon=True).start()


def test_nothing_listens(owner: Path, open_session: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    for certs in (None, owner / "alice"):
        words = ("nothing listens", address, "cloud_node serve")
        refused(UnreachableError, *words, go=open_session, address=address, certs=certs)


@pytest.mark.parametrize("greeting", [b"SSH-2.0-Something\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 64, b""])
def test_a_port_where_something_else_answers(greeting: bytes, owner: Path, open_session: Callable[..., None]) -> None:
    with saying(greeting) as address:
        words = (address, "broke the connection", "check that a cloud node is running there")
        refused(UnreachableError, *words, go=open_session, address=address, certs=None)
        with pytest.raises((UnreachableError, CertificateError)) as caught:
            open_session(address, owner / "alice")
        assert address in str(caught.value)
        assert "\n" not in str(caught.value)


@contextmanager
def saying(greeting: bytes) -> Iterator[str]:
    """A TCP service that greets whoever comes with these bytes and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                with caller:
                    caller.settimeout(5)
                    try:
                        caller.recv(1)
                        caller.sendall(greeting)
                    except OSError:
                        continue

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


class Stub(pb_grpc.BackboneServicer):
    """A server that answers from another protocol."""

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.ModelCard:  # noqa: N802
        return pb.ModelCard(protocol=999)

    def Exchange(  # noqa: N802
        self, frames: Iterator[pb.ClientFrame], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerFrame]:
        failure = pb.Failure(code="version", message=f"the client speaks protocol {PROTOCOL} and this server 999")
        yield pb.ServerFrame(failure=failure)


@contextmanager
def grpc_server(servicer: pb_grpc.BackboneServicer | None) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    if servicer is not None:
        pb_grpc.add_BackboneServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def test_a_grpc_server_of_another_service(open_session: Callable[..., None]) -> None:
    with grpc_server(None) as address:
        refused(WireError, "is not an Isthmus cloud node", go=open_session, address=address, certs=None)


def test_a_server_of_another_protocol(open_session: Callable[..., None]) -> None:
    with grpc_server(Stub()) as address:
        refused(VersionError, "999", "match the versions", go=open_session, address=address, certs=None)
        link = Link(address, None, pb.Open(protocol=PROTOCOL, session="s"), Ledger(), Limits().to_wire(), PATIENCE_S)
        with pytest.raises(VersionError, match="999"):
            link.open()


def test_a_client_of_another_protocol_is_told_to_match_versions(guarded: Server, owner: Path) -> None:
    alice = identity(owner, "alice")
    with pytest.raises(grpc.RpcError) as caught:
        describe(guarded.address, alice, protocol=999)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert isinstance(read_status(caught.value.details()), VersionError)
    card = describe(guarded.address, alice)
    with RawStream(guarded.address, alice) as stream:
        stream.send(pb.ClientFrame(open=opening(card, "from-the-future", protocol=999)))
        (frame,) = stream.rest()
    assert frame.failure.code == "version"
    assert "install the same isthmus version" in frame.failure.message


def test_a_server_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, open_session: Callable[..., None]
) -> None:
    monkeypatch.setattr("edge_client.server.ANSWER_WITHIN_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        refused(UnreachableError, address, "did not answer", go=open_session, address=address, certs=None)
