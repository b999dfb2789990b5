"""A node on Ray that begins anew when the head is lost: the process that watches the one that serves.

Knows exit codes and signals; knows no Ray. Ray ends every process that speaks to a head which is gone; clients send
again what they wait for, so nothing else is lost.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from cloud_node.on_ray.cluster import HEAD_LOST
from isthmus.errors import UnreachableError
from isthmus.trust.address import split_address

CHILD = "ISTHMUS_SUPERVISED"
"""Names, in the environment of the process that serves, the one that watches it."""

PARENT_EVERY_S = 0.2

REJOIN_EVERY_S = 5.0
REJOIN_WITHIN_S = 600.0
"""How long a cluster whose head was lost is waited for."""


def supervised(listen: str) -> int | None:
    """Serve in a process of its own, and in another whenever Ray's head is lost; Ray ends a process with its head.

    Returns:
        The exit code of the last one; None in that process itself, which is to go on and serve.
    """
    if CHILD in os.environ:
        _end_with_parent(int(os.environ[CHILD]))
        return None
    command = [sys.executable, "-m", "cloud_node", *sys.argv[1:], "--listen", _settled(listen)]
    stopping: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def stop(signum: int, _: object) -> None:
        stopping.append(signum)
        if child is not None:
            child.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    lost = -math.inf
    while True:
        child = subprocess.Popen(command, env={**os.environ, CHILD: str(os.getpid())}, start_new_session=True)
        if stopping:  # it was asked for while there was no child to tell
            child.send_signal(stopping[-1])
        code = child.wait()
        if code == HEAD_LOST:
            lost = time.monotonic()
        elif code == UnreachableError.exit_code and time.monotonic() - lost < REJOIN_WITHIN_S:
            time.sleep(REJOIN_EVERY_S)
        else:
            return code
        if stopping:
            return 0


def _settled(listen: str) -> str:
    """An address with a port: a node that begins anew must be found where it was."""
    host, port = split_address(listen)
    if port:
        return listen
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        found.bind((host, 0))
        return f"{listen.rpartition(':')[0]}:{found.getsockname()[1]}"


def _end_with_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_EVERY_S)
        os.kill(os.getpid(), signal.SIGKILL)  # as it was: Ray ends what this process has started

    threading.Thread(target=watch, name="parent", daemon=True).start()
