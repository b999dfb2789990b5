"""Whose a key is, every edge finds for itself."""

from pathlib import Path

import pytest

from isthmus.errors import CertificateError, LimitError, WireError
from isthmus.rounds.masks import Attempt
from isthmus.rounds.signed_keys import checked, require_cohort, signed
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb

ATTEMPT, TERMS, PUBLIC = Attempt("run", 2, 5), b"t" * 32, b"p" * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two edges of one authority."""
    made = tmp_path_factory.mktemp("certs")
    certificates.init_authority(made)
    for name in ("edge-a", "edge-b"):
        certificates.issue(made, name)
    return made


def key_of(folder: Path, name: str = "edge-a", attempt: Attempt = ATTEMPT) -> pb.RoundKey:
    """A key as an edge sends it."""
    return signed(Credentials.load(folder / name), "reviews", attempt, TERMS, PUBLIC)


def check(key: pb.RoundKey, folder: Path, attempt: Attempt = ATTEMPT, terms: bytes = TERMS) -> str:
    """Whose it is, as edge-b finds."""
    return checked(key, Credentials.load(folder / "edge-b").ca, "reviews", attempt, terms)


def test_a_key_is_its_edges(folder: Path) -> None:
    """By the name in its certificate."""
    assert check(key_of(folder), folder) == "spiffe://isthmus/edge/edge-a"


@pytest.mark.parametrize("attempt", [Attempt("run", 2, 6), Attempt("run", 1, 5), Attempt("other", 2, 5)])
def test_a_key_of_another_attempt_round_or_run_is_refused(folder: Path, attempt: Attempt) -> None:
    """Replayed, it is signed for something else."""
    with pytest.raises(WireError, match="not signed by it"):
        check(key_of(folder, attempt=attempt), folder)


def test_a_wrong_signature_is_refused(folder: Path) -> None:
    """One of another edge, another key under it, other terms, or none."""
    good, other = key_of(folder), key_of(folder, "edge-b")
    wrong = [pb.RoundKey(), pb.RoundKey(), pb.RoundKey()]
    for each in wrong:
        each.CopyFrom(good)
    wrong[0].signature = other.signature
    wrong[1].public_key = b"q" * 32
    wrong[2].signature = b""
    for each in wrong:
        with pytest.raises(WireError, match="not signed by it"):
            check(each, folder)
    with pytest.raises(WireError, match="not signed by it"):
        check(good, folder, terms=b"u" * 32)


def test_a_certificate_of_nobody_is_refused(folder: Path, tmp_path: Path) -> None:
    """Of another authority, of a server, or none at all."""
    certificates.init_authority(tmp_path)
    certificates.issue(tmp_path, "edge-a")
    with pytest.raises(CertificateError, match="another authority"):
        check(key_of(tmp_path), folder)
    with pytest.raises(CertificateError, match="server's certificate"):
        check(key_of(folder, "server"), folder)
    with pytest.raises(CertificateError, match="no certificate"):
        check(pb.RoundKey(public_key=PUBLIC), folder)


def test_a_cohort_of_two_is_refused(folder: Path) -> None:
    """Whatever was asked for; and one with an edge twice."""
    with pytest.raises(LimitError, match="needs 3"):
        require_cohort(["a", "b"], 1)
    with pytest.raises(LimitError, match="needs 4"):
        require_cohort(["a", "b", "c"], 4)
    with pytest.raises(WireError, match="twice"):
        require_cohort(["a", "b", "c", "c"], 3)
    require_cohort(["a", "b", "c"], 3)
