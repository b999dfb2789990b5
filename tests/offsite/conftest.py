"""What these tests share: a node over mutual TLS that offers emulators and takes adapters of edges that it knows."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from tests.harness import Server, serving
from tests.offsite.by_hand import MIB, make_emulator

KNOWN = ("alice", "bob", "carol", "dave")
"""Edges whose signing keys the node has: not `mallory`; and under the name of `swapped` it has the key of another."""


@dataclass(frozen=True)
class Node:
    """A node, and the folders that it was given."""

    server: Server
    model: Path
    owner: Path
    emulators: Path
    submissions: Path

    def identity(self, name: str) -> Credentials:
        """One of the owner's identities."""
        return Credentials.load(self.owner / name)

    @property
    def publisher(self) -> Ed25519PrivateKey:
        """The key that the owner signs emulators with."""
        return self.identity("server").signing_key()

    def kept(self) -> list[Path]:
        """Everything under the folder of submissions, hidden or not."""
        return sorted(self.submissions.rglob("*"))


@pytest.fixture(scope="package")
def node(tiny_models: dict[str, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    place = tmp_path_factory.mktemp("offsite")
    owner, emulators, submissions = place / "owner", place / "emulators", place / "submissions"
    certificates.init_authority(owner)
    for name in (*KNOWN, "mallory", "swapped"):
        certificates.issue(owner, name)
    signers = place / "signers"
    signers.mkdir()
    for name in KNOWN:
        shutil.copy(owner / "authority" / "issued" / f"{name}.pub", signers)
    shutil.copy(signers / "alice.pub", signers / "swapped.pub")
    key = Credentials.load(owner / "server").signing_key()
    for name, cut, padding in (("half", "1:1", 0), ("large", "2:1", 3 * MIB), ("victim", "2:0", 0)):
        make_emulator(emulators / name, tiny_models["llama"], cut, key, padding)
    flags = ("--emulators", emulators, "--submissions", submissions, "--signers", signers, "--certs", owner / "server")
    with serving(tiny_models["llama"], "--cut", "1:1", *map(str, flags), cache=cache) as server:
        yield Node(server, tiny_models["llama"], owner, emulators, submissions)
        assert server.process.poll() is None, server.log
        assert "Traceback" not in server.log, server.log
