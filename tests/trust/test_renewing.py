"""Identities are renewed and ended while everything runs."""

import json
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from cloud_node.certs import app
from edge_client.link import Link
from isthmus.errors import CertificateError
from isthmus.ledger.record import Ledger
from isthmus.trust import certificates, profiles, renewing
from isthmus.trust.credentials import Credentials, peer_identity
from isthmus.trust.revocation import FILE, read_list
from isthmus.wire.gen import backbone_pb2 as pb
from tests.bad_input.raw import RawStream, describe, opening
from tests.faults.training import Background, adapter, run_here, same_bits, settings, wait_until
from tests.harness import Server, serving
from tests.watching.reading import StatusPort

HOUR_S = 3600


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    certificates.init_authority(tmp_path / "certs")
    for name in ("alice", "bob"):
        certificates.issue(tmp_path / "certs", name)
    return tmp_path / "certs"


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())


def command(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def names(folder: Path) -> list[str]:
    found = certificate(folder).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def test_a_rotated_identity_has_new_keys_the_old_names_and_its_signing_key(owner: Path) -> None:
    for name in ("alice", "server"):
        before, signing = Credentials.load(owner / name), (owner / name / "signing.key").read_bytes()
        said = names(owner / name)
        renewing.rotate(owner, name)
        after = Credentials.load(owner / name)
        assert after.key != before.key
        assert after.certificate != before.certificate
        assert names(owner / name) == said
        assert (owner / name / "signing.key").read_bytes() == signing
        assert stat.S_IMODE((owner / name / "key.pem").stat().st_mode) == 0o600
    assert len(certificates.serials_of(owner, "alice")) == 2
    assert read_list(owner / "authority", (owner / "authority" / "ca.pem").read_bytes()) == frozenset()


def test_a_reader_never_gets_a_key_and_a_certificate_that_do_not_belong_together(owner: Path) -> None:
    known = Credentials.load(owner / "alice")
    seen, over = [], threading.Event()

    def read() -> None:
        fresh = known
        while not over.is_set():
            fresh = fresh.fresh()
            seen.append((fresh.key, fresh.certificate))

    reading = threading.Thread(target=read)
    reading.start()
    made = {(known.key, known.certificate)}
    for _ in range(20):
        renewing.rotate(owner, "alice")
        loaded = Credentials.load(owner / "alice")
        made.add((loaded.key, loaded.certificate))
    over.set()
    reading.join()
    assert set(seen) <= made
    assert len(set(seen)) > 1


@pytest.mark.parametrize(
    ("uri", "good"),
    [
        ("spiffe://hospital.example/ward/7", True),
        ("spiffe://hospital.example/a_b-c.d", True),
        ("spiffe://hospital.example", False),
        ("spiffe://hospital.example/", False),
        ("spiffe://hospital.example/a//b", False),
        ("spiffe://hospital.example/../bob", False),
        ("spiffe://Hospital.example/ward", False),
        ("spiffe://hospital.example:443/ward", False),
        ("spiffe://user@hospital.example/ward", False),
        ("spiffe://hospital.example/ward?x=1", False),
        ("spiffe://isthmus/edge/bob", False),
        (f"spiffe://hospital.example/{'x' * 2048}", False),
    ],
)
def test_a_spiffe_id_is_taken_as_the_standard_has_it_and_never_somebody_elses(
    owner: Path, uri: str, good: bool
) -> None:
    if not good:
        with pytest.raises(CertificateError):
            certificates.issue(owner, "carol", [uri])
        return
    assert names(certificates.issue(owner, "carol", [uri])) == [uri]
    renewing.rotate(owner, "carol")
    assert names(owner / "carol") == [uri]
    with pytest.raises(CertificateError, match="one SPIFFE URI"):
        certificates.issue(owner, "dave", [uri, uri])


def test_a_caller_is_who_its_one_uri_says() -> None:
    def who(*sans: str) -> str:
        context = {"x509_subject_alternative_name": [san.encode() for san in sans], "x509_common_name": [b"carol"]}
        return peer_identity(context)

    assert who("localhost", "spiffe://hospital.example/ward/7") == "spiffe://hospital.example/ward/7"
    assert who("spiffe://a/b", "spiffe://isthmus/edge/alice") == "cn:carol", "of several none is believed"
    assert who("localhost") == "cn:carol"


def test_an_hour_is_enough_and_less_is_not(owner: Path) -> None:
    command("issue", "--name", "brief", "--dir", owner, "--hours", "2")
    found = certificate(owner / "brief")
    lives = found.not_valid_after_utc - found.not_valid_before_utc - profiles.CLOCK_SKEW
    assert lives.total_seconds() == 2 * HOUR_S
    assert (
        CliRunner().invoke(app, ["issue", "--name", "x", "--dir", str(owner), "--hours", "0.5"]).exception is not None
    )


def test_the_list_is_signed_and_goes_to_the_servers(owner: Path) -> None:
    command("revoke", "--name", "alice", "--dir", owner)
    authorities = (owner / "authority" / "ca.pem").read_bytes()
    for folder in (owner / "authority", owner / "server"):
        assert read_list(folder, authorities) == frozenset({certificate(owner / "alice").serial_number})
    assert not (owner / "bob" / FILE).exists()
    told = {row["name"]: row for row in json.loads(command("list", "--dir", owner, "--json"))}
    assert {name: row["revoked"] for name, row in told.items()} == {"alice": True, "bob": False, "server": False}
    content = bytearray((owner / "server" / FILE).read_bytes())
    content[200] ^= 1
    (owner / "server" / FILE).write_bytes(content)
    with pytest.raises(CertificateError, match="no list of this authority's"):
        read_list(owner / "server", authorities)
    certificates.init_authority(owner / "another")
    renewing.revoke(owner / "another", "server")
    shutil.copy(owner / "another" / "authority" / FILE, owner / "server" / FILE)
    with pytest.raises(CertificateError, match="no list of this authority's"):
        read_list(owner / "server", authorities)


def test_certificates_that_are_revoked_at_once_are_all_on_the_list(owner: Path) -> None:
    names = [f"edge-{number}" for number in range(8)]
    for name in names:
        certificates.issue(owner, name)
    threads = [threading.Thread(target=renewing.revoke, args=(owner, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    home = owner / profiles.AUTHORITY
    listed = read_list(home, (home / "ca.pem").read_bytes())
    assert {certificate(owner / name).serial_number for name in names} == listed


@pytest.mark.parametrize("last", ["retiring.key", "ca.key"])
def test_a_rotation_of_the_authority_that_dies_before_its_certificate_is_taken_back_by_the_next(
    owner: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    replace = renewing.replace_private

    def dies(path: Path, content: bytes) -> None:
        replace(path, content)
        if path.name == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(renewing, "replace_private", dies)
        with pytest.raises(KeyboardInterrupt):
            renewing.rotate_authority(owner)
    renewing.rotate_authority(owner)
    renewing.rotate(owner, "server")
    renewing.rotate(owner, "alice")
    renewing.rotate(owner, "bob")
    renewing.retire_authority(owner)
    assert not (owner / profiles.AUTHORITY / "retiring.key").exists()
    renewing.rotate_authority(owner)
    assert len(x509.load_pem_x509_certificates((owner / "alice" / "ca.pem").read_bytes())) == 2


def test_one_authority_follows_another(owner: Path) -> None:
    old = (owner / "authority" / "ca.pem").read_bytes()
    command("rotate", "--name", "authority", "--dir", owner)
    both = (owner / "authority" / "ca.pem").read_bytes()
    assert both.endswith(old)
    assert (owner / "alice" / "ca.pem").read_bytes() == both
    with pytest.raises(CertificateError, match="alice has a certificate of the old authority"):
        renewing.retire_authority(owner)
    for name in ("alice", "bob", "server"):
        command("rotate", "--name", name, "--dir", owner)
    command("retire", "--dir", owner)
    assert old not in (owner / "authority" / "ca.pem").read_bytes()
    assert not (owner / "authority" / "retiring.key").exists()
    assert Credentials.load(owner / "alice").ca == (owner / "authority" / "ca.pem").read_bytes()


def test_what_cannot_be_renewed_is_named(owner: Path) -> None:
    for name in ("carol", "authority", "../alice"):
        with pytest.raises(CertificateError, match="no identity"):
            renewing.rotate(owner, name)
        with pytest.raises(CertificateError, match="no certificate"):
            renewing.revoke(owner, name)
    with pytest.raises(CertificateError, match="leave --signing-key out"):
        renewing.rotate(owner, "server", signing_key=True)
    with pytest.raises(CertificateError, match="no authority is being replaced"):
        renewing.retire_authority(owner)


@pytest.fixture
def node(owner: Path, tiny_models: dict[str, Path], tmp_path: Path) -> Iterator[Server]:
    flags = ("--cut", "1:1", "--certs", str(owner / "server"), "--status-port", "0")
    with serving(tiny_models["llama"], *flags, cache=tmp_path / "cache") as server:
        yield server


@pytest.fixture
def begin(
    node: Server, owner: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Background]:
    config = settings(node, rows, certs=owner / "alice", steps=200)
    return lambda: Background(config, tmp_path / "run", monkeypatch)


def test_certificates_rotated_in_mid_run_change_nothing_and_need_no_restart(
    node: Server, owner: Path, begin: Callable[[], Background], servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    run_here(settings(servers["llama"], rows, steps=200), tmp_path / "undisturbed")
    until = StatusPort.of(node).figures()["certificate_s"]
    run = begin()
    run.reaches(5)
    renewing.rotate_authority(owner)
    for name in ("alice", "bob", "server"):
        renewing.rotate(owner, name, days=60, revoke_old=name == "alice")
    renewing.retire_authority(owner)
    # The stream of the old certificate ends; the next brings the new one, and is judged by the new authority.
    wait_until(lambda: node.log.count("opened by spiffe://isthmus/edge/alice") > 1 or bool(run._ended), "a new stream")
    report = run.result()
    assert report.status == "complete"
    assert same_bits(adapter(run.out), adapter(tmp_path / "undisturbed"))
    assert StatusPort.of(node).figures()["certificate_s"] > until + 20 * 24 * HOUR_S
    assert describe(node.address, Credentials.load(owner / "bob")).blocks


def test_a_revoked_edge_is_out_within_seconds_for_good_and_others_are_not(
    node: Server, owner: Path, begin: Callable[[], Background]
) -> None:
    bob = Credentials.load(owner / "bob")
    card = describe(node.address, bob)
    with RawStream(node.address, bob) as other:
        other.send(pb.ClientFrame(open=opening(card, "bobs")))
        assert other.receive() is not None
        run = begin()
        run.reaches(3)
        renewing.revoke(owner, "alice")
        with pytest.raises(CertificateError, match="revoked"):
            run.result()
        alice = Credentials.load(owner / "alice")
        link = Link(node.address, alice, opening(card, "again"), Ledger(), card.limits)
        with pytest.raises(CertificateError, match="ask the model owner for a new identity"):
            link.open()
        link.close()
        other.send(pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=7)))
        answer = other.receive()
        assert answer is not None
        assert answer.heartbeat.nonce == 7


def test_a_list_that_cannot_be_believed_lets_nobody_in_until_it_can(node: Server, owner: Path) -> None:
    bob = Credentials.load(owner / "bob")
    (owner / "server" / FILE).write_text("nonsense")
    with pytest.raises(Exception, match="cannot read its list of revoked"):
        describe(node.address, bob)
    (owner / "server" / FILE).unlink()
    assert describe(node.address, bob).blocks
