"""The processes that a node on Ray has started, found in the process tree, for tests that end one."""

import os
import signal
from pathlib import Path

from tests.harness import Server

STAGE, REPLICA, HEAD = "ray::StageProcess", "ray::ServeReplica", "gcs_server"


def below(pid: int) -> dict[int, str]:
    """The command of each process that descends from `pid`."""
    commands, children = {}, dict[int, list[int]]()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, IndexError):
            continue  # it has just ended
        children.setdefault(parent, []).append(int(place.name))
    found, look = {}, [pid]
    while look:
        for child in children.get(look.pop(), []):
            found[child] = commands[child]
            look.append(child)
    return found


def kinds(server: Server, kind: str) -> list[int]:
    """The processes of a kind that a node has."""
    return sorted(pid for pid, command in below(server.process.pid).items() if kind in command.split(" ")[0])


def end_one(server: Server, kind: str, number: int = 0) -> None:
    """Kill one of them."""
    os.kill(kinds(server, kind)[number], signal.SIGKILL)
