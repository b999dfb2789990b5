"""A server in a thread of this process: quick to start, to stop as if cut off, and to start again on its port."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloud_node.config import ServeConfig
from cloud_node.listening import serve
from cloud_node.node import build_service

WITHIN_S = 30.0


class Near:
    """Serves one cut of a model in plaintext."""

    def __init__(self, model: Path, activation_budget: int, cut: str = "1:1") -> None:
        """Start on a free port, keeping so many bytes for backward passes."""
        self._settings = ServeConfig(model=str(model), cut=[cut], activation_budget=activation_budget)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address = "127.0.0.1:0"
        self._start()

    def restart(self) -> None:
        """Break every stream off, forget everything, and listen where it did."""
        self._stop()
        self._start()

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new."""
        return self._service.draining

    def drain(self, grace_s: float) -> float:
        """End in good order, as at SIGTERM; returns how many seconds that took. `restart` brings it back."""
        began = time.monotonic()
        asyncio.run_coroutine_threadsafe(self._service.drain(grace_s), self._loop).result(grace_s + WITHIN_S)
        return time.monotonic() - began

    def close(self) -> None:
        """Stop for good."""
        self._stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WITHIN_S)
        self._loop.close()

    def _start(self) -> None:
        self._service = build_service(self._settings, None)
        begun = serve(self._service, self.address, None)
        self._server, port = asyncio.run_coroutine_threadsafe(begun, self._loop).result(WITHIN_S)
        self.address = f"127.0.0.1:{port}"

    def _stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(0), self._loop).result(WITHIN_S)


@contextmanager
def near(model: Path, activation_budget: int = 1 << 30) -> Iterator[Near]:
    """Such a server while in here."""
    server = Near(model, activation_budget)
    try:
        yield server
    finally:
        server.close()
