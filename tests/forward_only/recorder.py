"""A man in the middle of a plaintext line: passes every message of every call on, and keeps a copy.

Knows gRPC and bytes; what the messages say is for its reader to parse.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from isthmus.wire import options
from isthmus.wire.gen import backbone_pb2 as pb

STREAMS = 16


@dataclass
class Recording:
    """Messages by method, in the order in which they passed; `address` is where to connect instead of the server."""

    address: str = ""
    up: dict[str, list[bytes]] = field(default_factory=dict)
    down: dict[str, list[bytes]] = field(default_factory=dict)

    def client_frames(self) -> list[pb.ClientFrame]:
        """What the edge sent in its sessions."""
        return [pb.ClientFrame.FromString(message) for message in self.up.get("Exchange", [])]

    def server_frames(self) -> list[pb.ServerFrame]:
        """What the cloud answered in them."""
        return [pb.ServerFrame.FromString(message) for message in self.down.get("Exchange", [])]

    def calls(self) -> list[pb.Call]:
        """The requests among the edge's frames."""
        return [frame.call for frame in self.client_frames() if frame.HasField("call")]


class _Middle(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Every call looks like a stream from here: on the wire there is no difference."""

    def __init__(self, channel: grpc.Channel, recording: Recording) -> None:
        self._channel = channel
        self._recording = recording

    def service(self, details: Any) -> Any:
        """The handler of any method."""
        return grpc.stream_stream_rpc_method_handler(lambda sent, context: self._carry(details.method, sent, context))

    def _carry(self, method: str, sent: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        name = method.rpartition("/")[2]
        up = self._recording.up.setdefault(name, [])
        down = self._recording.down.setdefault(name, [])
        call = self._channel.stream_stream(method)(_kept(sent, up))  # type: ignore[call-arg]
        context.add_callback(call.cancel)
        try:
            yield from _kept(call, down)
        except grpc.RpcError as error:
            context.abort(error.code(), error.details() or "")


def _kept(messages: Iterable[bytes], place: list[bytes]) -> Iterator[bytes]:
    for message in messages:
        place.append(message)
        yield message


@contextmanager
def recording(server: str) -> Iterator[Recording]:
    """Stand between clients and the server at this address while in here."""
    kept = Recording()
    with grpc.insecure_channel(server, options=options.CLIENT) as channel:
        middle = grpc.server(ThreadPoolExecutor(STREAMS), handlers=[_Middle(channel, kept)], options=options.SERVER)
        kept.address = f"127.0.0.1:{middle.add_insecure_port('127.0.0.1:0')}"
        middle.start()
        try:
            yield kept
        finally:
            middle.stop(grace=1).wait()
