"""What trying again cannot help ends a session at the first attempt that meets it, with its remedy and exit code."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.errors import CertificateError, ForbiddenError, IsthmusError, LimitError, OwnerError, VersionError
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.status import status_details
from tests.bad_input.test_connection import expired
from tests.retry.lines import WITHIN_S, Script, Skipping, answering, ask, line_to, link_to, scripted, until_a_call


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("owner")
    certificates.init_authority(directory)
    certificates.issue(directory, "alice")
    certificates.issue(directory, "elsewhere", ["gpu.example.org"], "server")
    return directory


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stranger")
    certificates.init_authority(directory)
    return directory


def holding(number: int, frames: Iterator[Any], context: Any) -> Iterator[pb.ServerFrame]:
    """Opens, and leaves the call unanswered until the line goes."""
    yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
    until_a_call(frames)
    for _ in frames:
        pass


def refusing(code: grpc.StatusCode, details: str) -> Script:
    def script(number: int, frames: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.ServerFrame]:
        context.abort(code, details)
        yield pb.ServerFrame()

    return script


def failing(error: IsthmusError) -> Script:
    def script(number: int, frames: Iterator[Any], context: Any) -> Iterator[pb.ServerFrame]:
        yield pb.ServerFrame(failure=pb.Failure(code=error.code, message=str(error)))

    return script


@dataclass(frozen=True)
class Case:
    """What stands at the server's place when the session comes back, and what that is called."""

    error: type[IsthmusError]
    exit_code: int
    words: str
    script: Script = answering
    certificate: Callable[[Path, Path, Path], Credentials | None] | None = None


def served_by(authority: int, name: str) -> Callable[[Path, Path, Path], Credentials]:
    return lambda owner, stranger, _: Credentials.load((owner, stranger)[authority] / name)


def expired_server(owner: Path, _: Path, scratch: Path) -> Credentials:
    folder = expired(owner, "server", scratch / "old")
    return Credentials(*((folder / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")), folder)


def plaintext(*_: Path) -> None:
    return None


CASES = {
    "wrong authority": Case(CertificateError, 8, "is not from the authority", certificate=served_by(1, "server")),
    "expired": Case(CertificateError, 8, "has expired", certificate=expired_server),
    "another name": Case(CertificateError, 8, "is for gpu.example.org", certificate=served_by(0, "elsewhere")),
    "plaintext": Case(CertificateError, 8, "speaks plaintext", certificate=plaintext),
    "revoked": Case(CertificateError, 8, "ask for another", failing(CertificateError("revoked; ask for another"))),
    "unauthenticated": Case(
        CertificateError, 8, "ask the model owner for an identity", refusing(grpc.StatusCode.UNAUTHENTICATED, "who?")
    ),
    "not allowed": Case(ForbiddenError, 9, "is not allowed", failing(ForbiddenError("alice is not allowed this"))),
    "not allowed, by status": Case(
        ForbiddenError,
        9,
        "is not allowed",
        refusing(grpc.StatusCode.PERMISSION_DENIED, status_details(ForbiddenError("alice is not allowed this"))),
    ),
    "not allowed, by somebody between": Case(
        ForbiddenError, 9, "ask the model owner to allow", refusing(grpc.StatusCode.PERMISSION_DENIED, "RBAC")
    ),
    "another's": Case(OwnerError, 9, "belongs to", failing(OwnerError("session s belongs to another identity"))),
    "version": Case(VersionError, 7, "install the same", failing(VersionError("install the same version"))),
    "a limit without an end": Case(LimitError, 6, "too many", failing(LimitError("too many sessions"))),
    "another service": Case(IsthmusError, 5, "check the address", refusing(grpc.StatusCode.UNIMPLEMENTED, "no")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_session_that_comes_back_to_this_ends_at_the_first_attempt(
    case: Case, owner: Path, stranger: Path, tmp_path: Path
) -> None:
    server, alice = Credentials.load(owner / "server"), Credentials.load(owner / "alice")
    there = server if case.certificate is None else case.certificate(owner, stranger, tmp_path)
    with (
        scripted(holding, server) as before,
        scripted(case.script, there) as after,
        line_to(before.port) as line,
    ):
        retrying = Skipping(patience_s=1e6)
        link = link_to(line.address, alice, retrying)
        pending = ask(link)
        line.target = after.port
        line.reset()
        with pytest.raises(case.error) as caught:
            pending.result(WITHIN_S)
        with pytest.raises(case.error):
            ask(link, 2)
        link.close()
    assert len(retrying.attempts) <= 1  # none, where looking into the loss has met it already
    assert caught.value.exit_code == case.exit_code
    assert case.words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_identity_that_ran_out_meanwhile_ends_the_session_and_is_named(owner: Path, tmp_path: Path) -> None:
    old = expired(owner, "alice", tmp_path / "alice")
    alice = Credentials(*((old / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")), old)
    with scripted(answering, Credentials.load(owner / "server")) as server:
        link = link_to(f"127.0.0.1:{server.port}", alice, Skipping(patience_s=1e6))
        with pytest.raises(CertificateError, match=r"cert.pem expired on .* issue a new one"):
            link.open()
        link.close()
    assert server.streams == 0
