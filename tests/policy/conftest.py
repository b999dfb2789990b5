"""A node with a policy over mutual TLS, one in plaintext with the same policy, and who asks them for things."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from edge_client.submitting import pack
from isthmus.bundle import Manifest
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from tests.harness import Server, serving
from tests.offsite.by_hand import make_emulator, make_run

NAMED = ("alice", "bob")
UNNAMED = "cara"

RIGHTS = {
    "alice": {"cuts": ["1:1", "2:0"], "emulators": ["alices"], "rounds": ["for-alice"]},
    "bob": {"cuts": ["1:1", "0:2"], "emulators": ["bobs"], "rounds": ["for-bob"]},
}
"""Where the two differ; each may do the rest."""

LIMITED = {
    "short": {"sequence_length": 16},
    "few": {"sessions": 2},
    "narrow": {"tokens_in_flight": 64},
    "daily": {"tokens_per_day": 20},
    "daily_again": {"tokens_per_day": 20},
    "daily_few": {"tokens_per_day": 20},
    "slow": {"bytes_per_second": 200},
    "paced": {"bytes_per_second": 20_000},
    "thrice": {"gradients_per_input": 3},
    "leaving": {},
    "usual": {},
}
"""Tenants that may do everything, but not without end."""


@dataclass(frozen=True)
class Nodes:
    """The two nodes, and the folders that they were given."""

    guarded: Server
    plaintext: Server
    owner: Path
    emulators: Path
    submissions: Path
    adapters: Path
    file: Path

    def credentials(self, role: str) -> Credentials | None:
        """An identity of the owner's; None for who has none."""
        return Credentials.load(self.owner / role) if role != "anonymous" else None

    def server(self, role: str) -> Server:
        """The node that a role can reach."""
        return self.plaintext if role == "anonymous" else self.guarded


@pytest.fixture(scope="package")
def nodes(tiny_models: dict[str, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    place, model = tmp_path_factory.mktemp("policy"), tiny_models["llama"]
    owner, emulators, signers, file = (place / name for name in ("owner", "emulators", "signers", "policy.yaml"))
    submissions, adapters, rounds = place / "submissions", place / "adapters", ("--rounds", str(place / "rounds"))
    certificates.init_authority(owner)
    signers.mkdir()
    for name in LIMITED:
        certificates.issue(owner, name)
    for name in (*NAMED, UNNAMED):
        certificates.issue(owner, name)
        shutil.copy(owner / "authority" / "issued" / f"{name}.pub", signers)
        _adapter(place / "runs" / name, adapters / name, model, Credentials.load(owner / name))
    publisher = Credentials.load(owner / "server").signing_key()
    for padding, name in enumerate(("alices", "bobs")):
        make_emulator(emulators / name, model, "1:1", publisher, padding)
    write(file, tenants(model.name))
    cuts = ("--cut", "1:1", "--cut", "2:0", "--cut", "0:2", "--policy", str(file), "--emulators", str(emulators))
    plain, keys = (
        ("--submissions", str(place / "others")),
        ("--signers", str(signers), "--certs", str(owner / "server")),
    )
    with ExitStack() as stack:
        guarded = serving(
            model, *cuts, "--status-port", "0", "--submissions", str(submissions), *keys, *rounds, cache=cache
        )
        servers = [stack.enter_context(each) for each in (guarded, serving(model, *cuts, *plain, cache=cache))]
        yield Nodes(*servers, owner, emulators, submissions, adapters, file)
        for server in servers:
            assert server.process.poll() is None, server.log
            assert "Traceback" not in server.log, server.log


def tenants(model: str) -> dict[str, object]:
    """What each may do."""
    every = {"models": [model], "methods": ["*"], "exchanges": ["*"], "cuts": ["*"], "submit": True}
    limited = {name: {**every, "limits": limits} for name, limits in LIMITED.items()}
    return {**{name: {**every, **RIGHTS[name]} for name in NAMED}, **limited}


def write(file: Path, tenants: dict[str, object], **more: object) -> None:
    """A policy file."""
    file.write_text(yaml.safe_dump({"tenants": tenants, **more}))


def _adapter(run: Path, folder: Path, model: Path, credentials: Credentials) -> Manifest:
    folder.mkdir(parents=True)
    return pack(make_run(run, model), folder, credentials.signing_key())
