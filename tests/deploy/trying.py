"""Trying a command as far as its own command line goes: every flag and value is read and checked, and nothing starts.

Knows which program is ours, Ray's, a container engine's or the system's, and refuses a program that it does not know.
"""

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import cloud_node.cli
import cloud_node.logs
import cloud_node.models
import cloud_node.node
import cloud_node.on_ray.supervisor
import edge_client.cli
import edge_client.train
from cloud_node.config import ServeConfig
from edge_client.config import TrainConfig
from tests.deploy.engines import docker, kubectl
from tests.deploy.written import DEPLOY

SYSTEM = ("export", "install", "mkdir", "mv", "systemctl", "useradd")
"""What the README tells to type beside our own commands; their meaning is that of the system."""


class NotDoneError(Exception):
    """The command line is read, and what it would do is not done."""


class Trial:
    """Commands read, and the settings that ours were given."""

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        self._place = place
        self.served: list[ServeConfig] = []
        self.trained: list[TrainConfig] = []

        def train(settings: TrainConfig, *_: Any) -> None:
            self.trained.append(settings)
            raise NotDoneError

        patch.setattr(cloud_node.node, "run", self.served.append)
        patch.setattr(cloud_node.logs, "configure", lambda form, level: None)
        patch.setattr(cloud_node.on_ray.supervisor, "supervised", lambda _: None)
        patch.setattr(cloud_node.models, "fetch", lambda name, to: cloud_node.models.SOURCES[name] and to)
        patch.setattr(edge_client.train, "train", train)

    def of(self, words: list[str]) -> None:
        """Read a command whose paths are of this machine.

        Raises:
            Exception: what the program says of a flag or value that it refuses.
        """
        name = Path(words[0]).name
        if name not in SYSTEM:
            getattr(self, f"_{name.replace('-', '_')}")(words)

    def _cloud_node(self, words: list[str]) -> None:
        cloud_node.cli.app(words[1:], standalone_mode=False)

    def _edge_client(self, words: list[str]) -> None:
        with suppress(NotDoneError):
            edge_client.cli.app(words[1:], standalone_mode=False)

    def _begin_or_resume(self, words: list[str]) -> None:
        self._edge_client(["edge_client", *begun(self._place, words[1:])])

    def _docker(self, words: list[str]) -> None:
        docker(words[1:])

    def _kubectl(self, words: list[str]) -> None:
        kubectl(words[1:])

    def _install(self, words: list[str]) -> None:
        subprocess.run(["/bin/sh", "-c", " ".join(words)], check=True, capture_output=True, timeout=10)

    def _python(self, words: list[str]) -> None:
        assert words[1] == "-c"
        compile(words[2], "-c", "exec")

    def _ray(self, words: list[str]) -> None:
        scripts = pytest.importorskip("ray.scripts.scripts", reason="the extra `ray` is not installed")
        scripts.cli.commands[words[1]].make_context(words[1], words[2:])


def begun(place: Path, words: list[str]) -> list[str]:
    """What `begin-or-resume WORDS` calls `edge_client` with; nothing where it does not."""
    stand_in = place / "stand-in"
    stand_in.mkdir(exist_ok=True)
    (stand_in / "edge_client").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (stand_in / "edge_client").chmod(0o755)
    done = subprocess.run(
        [DEPLOY / "begin-or-resume", *words],
        env={"PATH": f"{stand_in}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return [] if "is complete" in done.stdout else done.stdout.splitlines()
