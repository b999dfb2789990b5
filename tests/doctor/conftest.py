"""What these tests share: identities, and a way to have one server looked at."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_client.doctor import Finding, examine
from edge_client.examined import Patient
from isthmus.trust import certificates

Look = Callable[..., dict[str, Finding]]


@pytest.fixture(scope="session")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An owner's authority, its server's identity, and alice's; bob's holds one day more."""
    directory = tmp_path_factory.mktemp("issued")
    certificates.init_authority(directory)
    certificates.issue(directory, "alice")
    certificates.issue(directory, "bob", days=1)
    certificates.issue(directory, "tomorrow", ["127.0.0.1"], "server", days=1)
    certificates.issue(directory, "elsewhere", ["gpu.example.org"], "server")
    return directory


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """Look at a server; what was found, by check."""

    def looked(server: str | int, certs: Path | None = None, insecure: bool = False) -> dict[str, Finding]:
        address = f"127.0.0.1:{server}" if isinstance(server, int) else server
        patient = Patient(address, certs, insecure, tmp_path / "cache", lambda words: None)
        return {found.check: found for found in examine(patient)}

    return looked


def failed(found: dict[str, Finding]) -> list[tuple[str, int]]:
    """The checks that failed, and their exit codes."""
    return [(name, each.exit_code) for name, each in found.items() if each.outcome == "fail"]
