"""Real mutual TLS on loopback: who gets in, who a peer is, and what a refusal is called."""

import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import grpc
import pytest

from isthmus.errors import CertificateError, UnreachableError, UsageError
from isthmus.trust import certificates, profiles
from isthmus.trust.address import split_address
from isthmus.trust.credentials import Credentials, diagnose, peer_identity

Serve = Callable[[Credentials | None], int]


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("owner")
    certificates.init_authority(directory)
    certificates.issue(directory, "alice")
    certificates.issue(directory, "elsewhere", ["gpu.example.org", "10.0.0.7"], "server")
    return directory


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stranger")
    certificates.init_authority(directory)
    certificates.issue(directory, "alice")
    return directory


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that answer with the caller's identity."""
    servers = []

    def start(credentials: Credentials | None) -> int:
        def who(_: bytes, context: grpc.ServicerContext) -> bytes:
            return peer_identity(cast("Mapping[str, Iterable[bytes]]", context.auth_context())).encode()

        server = grpc.server(futures.ThreadPoolExecutor(1))
        handlers = {"Who": grpc.unary_unary_rpc_method_handler(who, bytes, bytes)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
        port = (
            server.add_insecure_port("127.0.0.1:0")
            if credentials is None
            else server.add_secure_port("127.0.0.1:0", credentials.server())
        )
        server.start()
        servers.append(server)
        return port

    yield start
    for server in servers:
        server.stop(0)


def _ask(port: int, credentials: grpc.ChannelCredentials | None) -> str:
    target = f"127.0.0.1:{port}"
    channel = grpc.insecure_channel(target) if credentials is None else grpc.secure_channel(target, credentials)
    with channel:
        answer: bytes = channel.unary_unary("/test.Test/Who", bytes, bytes)(b"", timeout=5)
    return answer.decode()


def _refused(port: int, credentials: grpc.ChannelCredentials | None) -> bool:
    with pytest.raises(grpc.RpcError) as failure:
        _ask(port, credentials)
    return failure.value.code() is grpc.StatusCode.UNAVAILABLE


def _mixed(identity: Path, authority: Path, directory: Path) -> Credentials:
    """`identity` trusting another authority."""
    shutil.copytree(identity, directory)
    shutil.copy(authority / "ca.pem", directory / "ca.pem")
    return Credentials.load(directory)


def _expired(owner: Path, name: str, usage: profiles.Usage, patch: pytest.MonkeyPatch) -> Credentials:
    """An identity that expired an hour ago, read without the check that `load` makes."""

    class Yesterday(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) - timedelta(days=1, hours=1)

    with patch.context() as patched:
        patched.setattr(profiles, "datetime", Yesterday)
        folder = certificates.issue(owner, name, ["127.0.0.1"], usage, days=1)
    ca, certificate, key = ((folder / file).read_bytes() for file in ("ca.pem", "cert.pem", "key.pem"))
    return Credentials(ca, certificate, key, folder)


def test_the_server_knows_who_called(owner: Path, serve: Serve) -> None:
    alice = Credentials.load(owner / "alice")
    port = serve(Credentials.load(owner / "server"))
    assert _ask(port, alice.channel()) == "spiffe://isthmus/edge/alice"
    assert diagnose("127.0.0.1", port, alice) is None
    assert diagnose("localhost", port, alice) is None


def test_a_plaintext_peer_is_anonymous(serve: Serve) -> None:
    port = serve(None)
    assert _ask(port, None) == "anonymous"
    assert diagnose("127.0.0.1", port, None) is None


def test_a_certificate_without_a_spiffe_name_is_known_by_its_common_name() -> None:
    assert peer_identity({"x509_common_name": [b"bob"], "x509_subject_alternative_name": [b"bob.org"]}) == "cn:bob"


def test_a_client_of_another_authority_is_refused_and_told_so(
    owner: Path, stranger: Path, serve: Serve, tmp_path: Path
) -> None:
    port = serve(Credentials.load(owner / "server"))
    mixed = _mixed(stranger / "alice", owner / "alice", tmp_path / "mixed")
    assert _refused(port, mixed.channel())
    assert _says(diagnose("127.0.0.1", port, mixed), "the server refused", "authority")


def test_a_server_certificate_cannot_be_used_as_a_client(owner: Path, serve: Serve) -> None:
    server = Credentials.load(owner / "server")
    port = serve(server)
    assert _refused(port, server.channel())
    assert _says(diagnose("127.0.0.1", port, server), "a server's certificate")


def test_a_client_without_a_certificate_is_refused(owner: Path, serve: Serve) -> None:
    port = serve(Credentials.load(owner / "server"))
    assert _refused(port, grpc.ssl_channel_credentials((owner / "alice" / "ca.pem").read_bytes()))


def test_plaintext_against_tls_is_named_on_either_side(owner: Path, serve: Serve) -> None:
    alice = Credentials.load(owner / "alice")
    secure, plain = serve(Credentials.load(owner / "server")), serve(None)
    assert _refused(secure, None)
    assert _says(diagnose("127.0.0.1", secure, None), "wants TLS", "--certs")
    assert _refused(plain, alice.channel())
    assert _says(diagnose("127.0.0.1", plain, alice), "speaks plaintext", "--insecure")


def test_a_server_of_another_authority_is_refused_and_named(owner: Path, stranger: Path, serve: Serve) -> None:
    alice = Credentials.load(owner / "alice")
    port = serve(Credentials.load(stranger / "server"))
    assert _refused(port, alice.channel())
    assert _says(diagnose("127.0.0.1", port, alice), "is not from the authority")


def test_a_server_under_another_name_is_refused_with_the_names_it_has(owner: Path, serve: Serve) -> None:
    alice = Credentials.load(owner / "alice")
    port = serve(Credentials.load(owner / "elsewhere"))
    assert _refused(port, alice.channel())
    for host in ("127.0.0.1", "localhost"):
        assert _says(diagnose(host, port, alice), "gpu.example.org, 10.0.0.7", f"--san {host}")


def test_expired_certificates_are_refused_and_named(owner: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    alice = Credentials.load(owner / "alice")
    old_server = serve(_expired(owner, "old-server", "server", monkeypatch))
    assert _refused(old_server, alice.channel())
    assert _says(diagnose("127.0.0.1", old_server, alice), "127.0.0.1", "has expired")
    old_client = _expired(owner, "old-client", "client", monkeypatch)
    port = serve(Credentials.load(owner / "server"))
    assert _refused(port, old_client.channel())
    assert _says(diagnose("127.0.0.1", port, old_client), "old-client/cert.pem expired on")
    with pytest.raises(CertificateError, match="expired on"):
        Credentials.load(old_client.directory)


def test_a_server_that_is_not_there_may_be_tried_again(owner: Path) -> None:
    alice = Credentials.load(owner / "alice")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert _retryable(diagnose("127.0.0.1", port, alice, timeout_s=0.2), "did not answer")
    assert _retryable(diagnose("127.0.0.1", port, alice), "nothing listens")
    assert _retryable(diagnose("no-such-host.invalid", port, None), "does not resolve")


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
def test_a_missing_or_unreadable_file_is_named(owner: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(owner / "alice", tmp_path / "alice"))
    (folder / name).write_text("nonsense")
    with pytest.raises(CertificateError, match=f"{name} is no readable"):
        Credentials.load(folder)
    (folder / name).unlink()
    with pytest.raises(CertificateError, match=f"{name} is missing"):
        Credentials.load(folder)


def test_a_key_of_another_certificate_or_open_to_others_is_refused(owner: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(owner / "alice", tmp_path / "alice"))
    shutil.copy(owner / "server" / "key.pem", folder / "key.pem")
    with pytest.raises(CertificateError, match="does not belong"):
        Credentials.load(folder)
    (folder / "key.pem").chmod(0o644)
    with pytest.raises(CertificateError, match="chmod 600"):
        Credentials.load(folder)


def test_no_log_shows_the_key(owner: Path) -> None:
    assert "PRIVATE" not in repr(Credentials.load(owner / "alice"))


def _says(error: Exception | None, *words: str) -> bool:
    assert isinstance(error, CertificateError), error
    return all(word in str(error) for word in words) and "\n" not in str(error)


def _retryable(error: Exception | None, words: str) -> bool:
    assert isinstance(error, UnreachableError), error
    return words in str(error)


@pytest.mark.parametrize("host", ["a..b", "." * 3, "x" * 64])
def test_a_host_that_no_name_service_takes_is_refused_in_words(host: str) -> None:
    with pytest.raises(UsageError, match="is no host name"):
        split_address(f"{host}:7070")
