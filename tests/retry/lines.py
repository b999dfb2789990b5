"""What tests stand between a session and its server: a line that breaks as told, and servers that follow a script.

Knows sockets and gRPC; knows nothing of how an edge tries again.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import torch

from cloud_node.calls import Limits
from edge_client.link import Link
from edge_client.pending import Received
from edge_client.retrying import Retrying
from isthmus import PROTOCOL
from isthmus.ledger.record import Ledger
from isthmus.trust.credentials import Credentials
from isthmus.wire.frames import EXCHANGE, read_client_frame, serialise
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack

WITHIN_S = 60.0
"""Far beyond what anything here takes; whatever waits for it fails its test."""

Script = Callable[[int, Iterator[Any], grpc.ServicerContext], Iterator[pb.ServerFrame]]
"""What the n-th stream, from 1, is answered."""


class Line:
    """Carries bytes to a port; it can go silent, or break, and what it leads to can change. Iterates nothing."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.comers = 0
        self._open = threading.Event()  # carries; a line that does not keeps its sockets
        self._open.set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self) -> None:
        """Carry nothing more, and tell neither side: a cable that was pulled."""
        self._open.clear()

    def heal(self) -> None:
        """Carry what comes from now on; those that were swallowed are gone for good."""
        self._drop(reset=False)
        self._open.set()

    def reset(self) -> None:
        """Break every connection by RST."""
        self._drop(reset=True)

    def close(self) -> None:
        self._listener.close()
        self._drop(reset=False)

    def _drop(self, reset: bool) -> None:
        pairs, self._pairs = self._pairs, []
        for near, far in pairs:
            for end in (near, far):
                if reset:
                    with suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RD)
                end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.comers += 1
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if not self._open.is_set():
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


@contextmanager
def line_to(target: int) -> Iterator[Line]:
    line = Line(target)
    try:
        yield line
    finally:
        line.close()


class Scripted:
    """A server whose streams are answered by a script."""

    def __init__(
        self, script: Script, credentials: Credentials | None = None, options: Sequence[tuple[str, int]] = ()
    ) -> None:
        self.streams = 0
        self._script = script
        handler = grpc.stream_stream_rpc_method_handler(self._exchange, read_client_frame, serialise)
        service, method = EXCHANGE.strip("/").split("/")
        self._server = grpc.server(ThreadPoolExecutor(8), options=options)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials.server())
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0)

    def _exchange(self, frames: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.ServerFrame]:
        self.streams += 1
        yield from self._script(self.streams, frames, context)


@contextmanager
def scripted(script: Script, credentials: Credentials | None = None, **options: int) -> Iterator[Scripted]:
    """`options` are gRPC's, with `_` for the dot after `grpc`."""
    named = [(f"grpc.{name}", value) for name, value in options.items()]
    server = Scripted(script, credentials, named)
    try:
        yield server
    finally:
        server.stop()


def answering(number: int, frames: Iterator[Any], context: Any = None) -> Iterator[pb.ServerFrame]:
    """A good server: every call is answered with no tensors, every question for life with life."""
    yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
    for frame in frames:
        if isinstance(frame, pb.ClientFrame) and frame.HasField("call"):
            yield pb.ServerFrame(reply=pb.Reply(key=frame.call.key))
        if isinstance(frame, pb.ClientFrame) and frame.HasField("heartbeat"):
            yield pb.ServerFrame(heartbeat=pb.Heartbeat())


def until_a_call(frames: Iterator[Any]) -> pb.Call:
    """The next call; whatever else comes before it is passed over."""
    return next(frame.call for frame in frames if isinstance(frame, pb.ClientFrame) and frame.HasField("call"))


class Skipping(Retrying):
    """Waits for nothing: its clock jumps instead. Keeps when it would have tried, in seconds."""

    def __init__(self, patience_s: float = 120.0) -> None:
        self.skipped = 0.0
        self.attempts: list[float] = []
        super().__init__(patience_s, lambda: time.monotonic() + self.skipped)

    def wait(self, lock: threading.Condition, until: Callable[[], bool], seconds: float) -> None:
        self.skipped += seconds
        self.attempts.append(time.monotonic() + self.skipped)
        lock.wait_for(until, 0.01)  # others get the lock, as they would


def link_to(address: str, credentials: Credentials | None = None, retrying: Retrying | None = None) -> Link:
    opening, limits = pb.Open(protocol=PROTOCOL, session="s"), Limits().to_wire()
    return Link(address, credentials, opening, Ledger(), limits, retrying=retrying)


def ask(link: Link, microbatch: int = 1, values: int = 64) -> "Future[Received]":
    header, payload = pack(torch.ones(values), "none")
    key = pb.Key(microbatch=microbatch, pass_kind=pb.PASS_FORWARD)
    return link.request(pb.Call(key=key, tensors=[header], rows=pb.Rows(row_lengths=[2])), [payload], "train")


def most_in_a_minute(attempts: Sequence[float]) -> int:
    """The most attempts in any 60 seconds."""
    return max((sum(0 <= other - one < 60 for other in attempts) for one in attempts), default=0)
