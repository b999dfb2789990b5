"""Nodes and edges started from the files of deploy/, outside of containers, with their paths and ports put in place.

Knows processes, probes and what an operator lays out beforehand; which command is whose stands in the tests.
"""

import os
import shlex
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from cloud_node import cli
from tests.deploy.places import BIN, Places
from tests.deploy.written import DEPLOY, told
from tests.harness import ENVIRONMENT, Server, once_ready, save_tiny_model, write_rows

MODEL = "smollm2-135m"
"""What the files call their model; here it is a tiny one."""

STEPS = "--steps=100"
"""What makes the edges' runs long."""


def lay_out(place: Path) -> Path:
    """What the README has an operator make, in `place`: `deploy/site` (returned) for compose, and `certs`."""
    for words in told():
        laid(words, place)
    site = place / "deploy/site"
    save_tiny_model(site / "models" / MODEL, "llama")
    for edge in ("edge-a", "edge-b"):
        write_rows(site / "data" / edge / "train.jsonl", count=8)
        write_rows(site / "data" / edge / "held-out.jsonl", count=4, seed=1)
    return site


def laid(words: list[str], place: Path) -> None:
    """Do in `place` what a command of the README makes, moves or issues there; any other command is left alone."""
    if words[0] in ("mkdir", "mv"):
        subprocess.run(words, check=True, cwd=place)
    elif words[:2] == ["cloud_node", "certs"]:
        # Hosts of the files are this machine here, so the server's certificate must be good for it.
        here = ["--san", "localhost"] * ("--san" in words and "localhost" not in words)
        with chdir(place):
            cli.app([*words[1:], *here], standalone_mode=False)


def as_a_secret(folder: Path, mount: Path) -> Path:
    """A folder's files as Kubernetes mounts a Secret made of them: links to files that a group can read."""
    (mount / "..data").mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, mount / "..data" / file.name)
        (mount / "..data" / file.name).chmod(0o440)
        (mount / file.name).symlink_to(f"..data/{file.name}")
    return mount


@contextmanager
def started(words: list[str], cache: Path, **environment: str) -> Iterator[Server]:
    """A node that runs `words`, once it is ready; it is killed if it is still there at the end."""
    process = subprocess.Popen(words, env=_environment(cache, **environment), stdout=subprocess.PIPE, text=True)
    try:
        yield once_ready(process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)


def trained(words: list[str], cache: Path, steps: int = 3) -> "subprocess.Popen[str]":
    """An edge that runs `words`, under way; where they name a number of steps, it is `steps` here."""
    words = [f"--steps={steps}" if word == STEPS else word for word in words]
    return subprocess.Popen(words, env=_environment(cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def fewer_steps(settings: Path) -> None:
    """Have the run that a settings file describes be a short one."""
    settings.write_text(settings.read_text().replace("steps: 100", "steps: 3"))


def asked(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    """Status and text of a page."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def checked(words: list[str], places: Places) -> int:
    """Exit code of a container's own health check."""
    return subprocess.run([str(BIN / words[0]), *places.words(words[1:])], timeout=30, check=False).returncode


def outer_address() -> str:
    """An address of this machine that others would use; loopback where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation; nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _environment(cache: Path, **environment: str) -> dict[str, str]:
    path = f"{DEPLOY}:{BIN}:{os.environ['PATH']}"
    return {**ENVIRONMENT, "PATH": path, "ISTHMUS_CACHE": str(cache), **environment}


def script(words: list[str], places: Places) -> str:
    """What an `sh -c` runs, in place."""
    assert words[:2] == ["sh", "-c"], shlex.join(words)
    return places.here(words[2])
