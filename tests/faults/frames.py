"""The wire by hand: frames as any client in any language might send them, without our client's good manners."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edge_client.server import describe
from edge_client.stream import open_channel
from isthmus import PROTOCOL
from isthmus.ledger.record import Ledger
from isthmus.rows import Rows
from isthmus.trust.credentials import Credentials
from isthmus.wire.chunks import split
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from isthmus.wire.tensors import pack


class Wire:
    """One `Exchange` stream; iterate it to read."""

    def __init__(self, stub: pb_grpc.BackboneStub) -> None:
        self._out: queue.SimpleQueue[pb.ClientFrame | None] = queue.SimpleQueue()
        self._call = stub.Exchange(iter(self._out.get, None), timeout=60)

    def send(self, **body: object) -> None:
        self._out.put(pb.ClientFrame(**body))

    def call(
        self, microbatch: int, kind: "pb.Pass", *tensors: torch.Tensor, rows: Rows | None = None, keep: bool = False
    ) -> None:
        """A request with its chunks."""
        key = pb.Key(microbatch=microbatch, pass_kind=kind)
        headers, payloads = zip(*(pack(tensor, "none") for tensor in tensors), strict=True)
        self.send(call=pb.Call(key=key, tensors=headers, rows=rows.to_wire() if rows else None, keep=keep))
        for chunk in split(key, payloads):
            self.send(chunk=pb.Chunk(key=chunk.key, offset=chunk.offset, data=bytes(chunk.data)))

    def __iter__(self) -> Iterator[pb.ServerFrame]:
        return iter(self._call)

    def next(self) -> pb.ServerFrame:
        return next(self._call)

    def answer(self) -> tuple[pb.Reply, bytes]:
        """The next reply and its payload."""
        reply, payload = self.next().reply, b""
        while len(payload) < sum(tensor.size for tensor in reply.tensors):
            payload += self.next().chunk.data
        return reply, payload

    def end(self) -> None:
        self._out.put(None)

    def cancel(self) -> None:
        """Break it off, as a lost line would."""
        self._call.cancel()
        self._out.put(None)


@contextmanager
def wire(address: str, credentials: Credentials | None, session: str, cut: tuple[int, int] = (1, 1)) -> Iterator[Wire]:
    """A stream on a channel of its own that has asked for `session`; its first frame is still to be read."""
    digest = describe(address, credentials, Ledger()).model_digest
    with open_channel(address, credentials) as channel:
        opened = Wire(pb_grpc.BackboneStub(channel))
        opened.send(
            open=pb.Open(
                protocol=PROTOCOL,
                session=session,
                bottom=cut[0],
                top=cut[1],
                model_digest=digest,
                codec_activation="none",
                codec_gradient="none",
            )
        )
        try:
            yield opened
        finally:
            opened.end()
