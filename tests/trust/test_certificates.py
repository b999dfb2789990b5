"""What the authority promises: private files stay private, profiles are strict, mistakes are refused by name."""

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

from cloud_node.certs import app
from isthmus.errors import BundleError, CertificateError
from isthmus.trust import certificates, signing


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    certificates.init_authority(tmp_path / "certs", ["localhost", "127.0.0.1"])
    return tmp_path / "certs"


def _certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())


def _purposes(folder: Path) -> list[x509.ObjectIdentifier]:
    return list(_certificate(folder).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def _handshake(server: Path, client: Path, host: str) -> None:
    """A strict mutual handshake in memory."""
    contexts = []
    for folder, purpose in ((client, ssl.Purpose.SERVER_AUTH), (server, ssl.Purpose.CLIENT_AUTH)):
        context = ssl.create_default_context(purpose, cafile=folder / "ca.pem")
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        contexts.append(context)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = contexts[0].wrap_bio(down, up, server_hostname=host)
    theirs = contexts[1].wrap_bio(up, down, server_side=True)
    for side in (ours, theirs, ours, theirs):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_strict_verifier_accepts_the_chain_on_both_sides(owner: Path, host: str) -> None:
    _handshake(owner / "server", certificates.issue(owner, "alice"), host)


def test_a_strict_verifier_refuses_a_server_certificate_shown_by_a_client(owner: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        _handshake(owner / "server", owner / "server", "localhost")


def test_each_certificate_serves_one_side_only_and_names_its_owner(owner: Path) -> None:
    alice = certificates.issue(owner, "alice")
    assert _purposes(alice) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert _purposes(owner / "server") == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = _certificate(alice).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://isthmus/edge/alice"]
    assert _certificate(alice).subject.rfc4514_string() == "CN=alice"


def test_private_files_are_for_their_owner_only(owner: Path) -> None:
    certificates.issue(owner, "alice")
    keys = [*owner.rglob("*.key"), *owner.rglob("key.pem")]
    assert len(keys) == 6
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    folders = [owner, *(path for path in owner.rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_a_server_signs_as_the_publisher_and_a_client_as_itself(owner: Path) -> None:
    alice = certificates.issue(owner, "alice")
    publisher = signing.load_public(alice / "publisher.pub")
    signing.verify(
        publisher, b"bundle", signing.sign(signing.load_private(owner / "server" / "signing.key"), b"bundle")
    )
    signature = signing.sign(signing.load_private(alice / "signing.key"), b"adapter")
    signing.verify(signing.load_public(owner / "authority" / "issued" / "alice.pub"), b"adapter", signature)
    with pytest.raises(BundleError, match="publisher"):
        signing.verify(publisher, b"adapter", signature)


def test_an_authority_is_never_overwritten(owner: Path) -> None:
    before = (owner / "authority" / "ca.pem").read_bytes()
    with pytest.raises(CertificateError, match="already exists"):
        certificates.init_authority(owner)
    assert (owner / "authority" / "ca.pem").read_bytes() == before


@pytest.mark.parametrize("name", ["", "authority", "Alice", "../alice", "a/b", ".a", "-a", "a" * 64, "a\n", "ä"])
def test_names_that_could_leave_the_folder_are_refused(owner: Path, name: str) -> None:
    with pytest.raises(CertificateError, match="name"):
        certificates.issue(owner, name)


@pytest.mark.parametrize("host", ["https://example.org", "example.org:50051", "spiffe://isthmus/edge/bob", "a b", ""])
def test_hosts_that_are_no_hosts_are_refused(owner: Path, host: str) -> None:
    with pytest.raises(CertificateError, match="host"):
        certificates.issue(owner, "second", [host], "server")
    assert not (owner / "second").exists()


def test_a_taken_name_a_server_without_hosts_and_a_missing_authority_are_refused(owner: Path, tmp_path: Path) -> None:
    certificates.issue(owner, "alice")
    with pytest.raises(CertificateError, match="already exists"):
        certificates.issue(owner, "alice")
    with pytest.raises(CertificateError, match="--san"):
        certificates.issue(owner, "second", usage="server")
    with pytest.raises(CertificateError, match="certs init"):
        certificates.issue(tmp_path / "elsewhere", "alice")
    with pytest.raises(CertificateError, match="--days"):
        certificates.issue(owner, "bob", days=0)


def test_a_signing_key_that_cannot_be_read_is_named(owner: Path) -> None:
    key = owner / "server" / "signing.key"
    key.write_text("not a key")
    with pytest.raises(CertificateError, match=r"signing\.key"):
        signing.load_private(key)
    key.chmod(0o640)
    with pytest.raises(CertificateError, match="chmod 600"):
        signing.load_private(key)
    with pytest.raises(CertificateError, match=r"publisher\.pub is missing"):
        signing.load_public(owner / "publisher.pub")
    with pytest.raises(CertificateError, match="Ed25519"):
        signing.load_private(owner / "server" / "key.pem")


def test_the_commands_make_identities_and_say_what_comes_next(tmp_path: Path) -> None:
    where = ["--dir", str(tmp_path / "certs")]
    made = CliRunner().invoke(app, ["init", *where, "--san", "gpu.example.org"])
    assert made.exit_code == 0, made.output
    assert "cloud_node certs issue" in made.output
    issued = CliRunner().invoke(app, ["issue", "--name", "alice", *where, "--days", "3"])
    assert issued.exit_code == 0, issued.output
    assert (tmp_path / "certs" / "alice" / "cert.pem").is_file()
    assert isinstance(CliRunner().invoke(app, ["issue", "--name", "alice", *where]).exception, CertificateError)
    assert "Example:" in CliRunner().invoke(app, ["issue", "--help"]).output
