"""What these tests share: one server over mutual TLS, and identities of its authority and of another."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.trust import certificates
from isthmus.wire.gen import backbone_pb2 as pb
from tests.bad_input.raw import describe, identity
from tests.harness import Server, serving

IDENTITIES = ("alice", "frames", "fuzz", "crowd", "slow")
"""One per test file or so: sessions, and the limit on them, belong to an identity."""


@pytest.fixture(scope="package")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authority of the server below, and the identities that it handed out."""
    directory = tmp_path_factory.mktemp("owner")
    certificates.init_authority(directory)
    for name in IDENTITIES:
        certificates.issue(directory, name)
    return directory


@pytest.fixture(scope="package")
def guarded(owner: Path, tiny_models: dict[str, Path], cache: Path) -> Iterator[Server]:
    """A server over mutual TLS that must survive every test here."""
    with serving(tiny_models["llama"], "--cut", "1:1", "--certs", str(owner / "server"), cache=cache) as server:
        yield server
        assert server.process.poll() is None, server.log
        assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="package")
def card(guarded: Server, owner: Path) -> pb.ModelCard:
    """What that server says of its model, the same to every edge."""
    return describe(guarded.address, identity(owner, "alice"))
