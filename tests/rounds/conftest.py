"""Identities and a node for the tests of rounds."""

from pathlib import Path

import pytest

from isthmus.trust import certificates
from tests.rounds.edges import Node


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server and four edges of one authority, edge-0 to edge-3."""
    made = tmp_path_factory.mktemp("certs")
    certificates.init_authority(made)
    for at in range(4):
        certificates.issue(made, f"edge-{at}")
    return made


@pytest.fixture
def node(tmp_path: Path, identities: Path) -> Node:
    """A node that holds rounds."""
    return Node(tmp_path / "rounds", (identities / "server" / "ca.pem").read_bytes())
