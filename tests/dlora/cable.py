"""A line that can be cut: bytes pass between a port of its own and a server's until somebody pulls the plug."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.trust.address import split_address


class Cable:
    """Listens for as long as it is; `cut` breaks what goes through at this moment, and new connections pass."""

    def __init__(self, address: str) -> None:
        """Lead to `address`."""
        self._to = split_address(address)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """Where to connect to."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Break every connection, without a word to either side."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut, and take nothing new."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=_carry, args=(one, other), daemon=True).start()


def _carry(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)


@contextmanager
def cable(address: str) -> Iterator[Cable]:
    """A line to a server while in here."""
    laid = Cable(address)
    try:
        yield laid
    finally:
        laid.close()
