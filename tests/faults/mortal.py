"""A server that tests may kill.

Knows its process and its port; what it serves and how, each test file says.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.training import kill, port_of
from tests.harness import Server, start_server


class Mortal:
    """A server that may be killed, and started again on its port; whoever comes next finds it running."""

    def __init__(self, model: Path, cache: Path, *flags: str) -> None:
        self._start = lambda port: start_server(model, *flags, cache=cache, port=port)
        self.server = self._start(0)

    @property
    def address(self) -> str:
        """HOST:PORT, the same after each start."""
        return self.server.address

    def restart(self) -> None:
        """Start it again, once it was killed."""
        self.server = self._start(port_of(self.server))

    def running(self) -> Server:
        """The server, started again if a test before has killed it."""
        if self.server.process.poll() is not None:
            self.restart()
        return self.server


@contextmanager
def mortal_server(model: Path, cache: Path, *flags: str) -> Iterator[Mortal]:
    """A server of a model with a cache of its own, which is killed at the end."""
    mortal = Mortal(model, cache, *flags)
    try:
        yield mortal
    finally:
        kill(mortal.server)
