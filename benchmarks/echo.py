"""The ceiling: raw bytes through a bidirectional gRPC stream with mutual TLS, to a process of its own and back.

Knows bytes alone: no tensors, no checksums, no protocol buffers. Channel options and certificates are the product's.
"""

import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from edge_client.stream import open_channel
from isthmus import command
from isthmus.trust.credentials import Credentials
from isthmus.wire import options

SERVICE, METHOD = "isthmus.bench.Echo", "Echo"


class Echo:
    """One open stream to an echo server."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        """Connect."""
        self._channel = open_channel(address, credentials)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call: Any = self._channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)
        self._answers: Iterator[bytes] = call(iter(self._outgoing.get, None))

    def exchange(self, *messages: bytes) -> float:
        """Seconds until each message is back, one after the other."""
        began = time.perf_counter()
        for message in messages:
            self._outgoing.put(message)
            next(self._answers)
        return time.perf_counter() - began

    def pour(self, message: bytes, count: int) -> float:
        """Seconds until `count` messages are back, sent as fast as the stream takes them."""
        began = time.perf_counter()
        for _ in range(count):
            self._outgoing.put(message)
        for _ in range(count):
            next(self._answers)
        return time.perf_counter() - began

    def close(self) -> None:
        """End the stream."""
        self._outgoing.put(None)
        self._channel.close()


def _serve(certs: Annotated[Path, typer.Option(help="folder of the server's certificate")]) -> None:
    """Echo until stopped.

    Example: python -m benchmarks.echo --certs certs/server
    """
    handler = grpc.stream_stream_rpc_method_handler(lambda messages, _: messages)
    server = grpc.server(ThreadPoolExecutor(4), options=options.SERVER)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    port = server.add_secure_port("127.0.0.1:0", Credentials.load(certs).server())
    server.start()
    print(f"echo: ready on 127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    command.keep_freed_memory()
    typer.run(_serve)
