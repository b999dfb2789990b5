"""Where a container's paths and ports are outside of it: the table that lets its commands run here.

Knows how mounts are written; starts nothing.
"""

import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deploy.written import DEPLOY

BIN = Path(sys.executable).parent
GRPC, STATUS = 7070, 7071
HOSTS = ("cloud", "gpu.example.org")
"""Names under which the files call a cloud node."""


def free_port() -> int:
    """A TCP port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Places:
    """Paths there and here, and a port here for each of theirs."""

    paths: Mapping[str, Path]
    grpc: int = field(default_factory=free_port)
    status: int = field(default_factory=free_port)

    def here(self, text: str) -> str:
        """A word or a file's text with paths, hosts and ports of this machine; every place is put in once."""
        paths = sorted(self.paths, key=len, reverse=True)
        found = "|".join(rf"(?<![\w/.]){re.escape(path)}(?![\w-])" for path in paths) or "(?!)"
        text = re.sub(found, lambda each: str(self.paths[each[0]]), text)
        hosts = "|".join(map(re.escape, HOSTS))
        text = re.sub(rf"(?<![\w.])({hosts}):{GRPC}\b", f"localhost:{self.grpc}", text)
        return re.sub(rf"(?<=[:= ']){STATUS}\b", str(self.status), re.sub(rf":{GRPC}\b", f":{self.grpc}", text))

    def words(self, words: list[str]) -> list[str]:
        """A command with paths, hosts and ports of this machine."""
        # A port may stand in a word of its own.
        return [str(self.status) if word == str(STATUS) else self.here(word) for word in words]

    def copy(self, written: Path, place: Path) -> Path:
        """A file of deploy/ as it reads here, at `place`."""
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(self.here(written.read_text()))
        return place


def of_service(service: Mapping[str, Any], volumes: Path) -> Places:
    """What a service of compose mounts; named volumes are folders in `volumes`."""
    paths = {}
    for mount in service["volumes"]:
        named = mount["type"] == "volume"
        paths[mount["target"]] = volumes / mount["source"] if named else (DEPLOY / mount["source"])
    return Places(paths)


def of_container(container: Mapping[str, Any], volumes: Path) -> Places:
    """What a Kubernetes container mounts: each volume is the folder of its name in `volumes`."""
    return Places({mount["mountPath"]: volumes / mount["name"] for mount in container["volumeMounts"]})


def of_host(root: Path) -> Places:
    """What the systemd units name, below `root`; programs are the installed ones."""
    programs = {"cloud_node": BIN, "begin-or-resume": DEPLOY}
    paths = {f"/opt/isthmus/bin/{name}": place / name for name, place in programs.items()}
    return Places(
        paths | {path: root / path[1:] for path in ("/etc/isthmus", "/var/lib/isthmus", "/var/cache/isthmus")}
    )
