"""A stream to a server with nothing of the edge's own care in between: any frames, any bytes, in any order."""

import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch

from edge_client.stream import open_channel
from isthmus import PROTOCOL
from isthmus.trust.credentials import Credentials
from isthmus.wire.chunks import split
from isthmus.wire.frames import serialise
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from isthmus.wire.tensors import pack, unpack

ANSWER_WITHIN_S = 30.0
HIDDEN = 32


def describe(address: str, credentials: Credentials | None, protocol: int = PROTOCOL) -> pb.ModelCard:
    """The model card, or grpc.RpcError."""
    with open_channel(address, credentials) as channel:
        stub = pb_grpc.BackboneStub(channel)  # type: ignore[no-untyped-call]
        card: pb.ModelCard = stub.Describe(pb.DescribeRequest(protocol=protocol), timeout=ANSWER_WITHIN_S)
        return card


class RawStream:
    """Sends what it is given; answers are read as they come."""

    def __init__(self, address: str, credentials: Credentials | None) -> None:
        self._outgoing: queue.Queue[bytes | None] = queue.Queue()
        self._incoming: queue.Queue[pb.ServerFrame | grpc.RpcError | None] = queue.Queue()
        self._channel = open_channel(address, credentials)
        self._call = self._channel.stream_stream(
            "/isthmus.v1.Backbone/Exchange", response_deserializer=pb.ServerFrame.FromString
        )(iter(self._outgoing.get, None))
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, *frames: pb.ClientFrame | bytes) -> None:
        """Queue frames, or bytes in their place."""
        for frame in frames:
            self._outgoing.put(frame if isinstance(frame, bytes) else frame.SerializeToString())

    def receive(self) -> pb.ServerFrame | None:
        """The next frame; None at and after the stream's clean end. An error's status is raised."""
        frame = self._incoming.get(timeout=ANSWER_WITHIN_S)
        if frame is None:
            self._incoming.put(None)
        if isinstance(frame, grpc.RpcError):
            raise frame
        return frame

    def rest(self) -> list[pb.ServerFrame]:
        """Every frame until the stream's clean end."""
        return list(iter(self.receive, None))

    def finish(self) -> list[pb.ServerFrame]:
        """Stop sending, and read to the end."""
        self._outgoing.put(None)
        return self.rest()

    def close(self) -> None:
        """Break off."""
        self._outgoing.put(None)
        self._call.cancel()
        self._channel.close()

    def __enter__(self) -> "RawStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        try:
            for frame in self._call:
                self._incoming.put(frame)
            self._incoming.put(None)
        except grpc.RpcError as error:
            self._incoming.put(error)


@dataclass
class Answer:
    """A reply with its tensor's bytes, or the failure in its place."""

    reply: pb.Reply
    payload: bytearray = field(default_factory=bytearray)

    @property
    def whole(self) -> bool:
        """Whether all that the reply announced is here."""
        return len(self.payload) == sum(header.size for header in self.reply.tensors)

    @property
    def code(self) -> str:
        """The error's name in the catalogue; empty for none."""
        return self.reply.failure.code

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor that came."""
        assert not self.code, self.reply.failure
        return unpack(self.reply.tensors[0], self.payload, 1 << 30)


class Client:
    """A session on a raw stream."""

    def __init__(self, address: str, credentials: Credentials | None, opening: pb.Open) -> None:
        self.stream = RawStream(address, credentials)
        self.stream.send(pb.ClientFrame(open=opening))
        first = self.stream.receive()
        assert first is not None
        assert first.HasField("opened"), first

    def ask(self, *frames: pb.ClientFrame | bytes) -> Answer:
        """Send a request's frames and wait for its answer; nothing else may be under way."""
        self.stream.send(*frames)
        (answer,) = self.answers(1)
        return answer

    def answers(self, count: int) -> list[Answer]:
        """The next answers, whole, in the order in which they begin; their chunks may take turns."""
        begun: dict[tuple[int, int], Answer] = {}
        while len(begun) < count or not all(answer.whole for answer in begun.values()):
            frame = self.stream.receive()
            assert frame is not None, "the stream ended"
            if frame.HasField("reply"):
                begun[frame.reply.key.microbatch, frame.reply.key.pass_kind] = Answer(frame.reply)
                continue
            assert frame.HasField("chunk"), frame
            begun[frame.chunk.key.microbatch, frame.chunk.key.pass_kind].payload += frame.chunk.data
        return list(begun.values())

    def ending(self) -> pb.Failure:
        """The failure that ends the session, after which the stream ends in good order."""
        frames = self.stream.rest()
        assert [frame.WhichOneof("body") for frame in frames] == ["failure"], frames
        return frames[0].failure

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.stream.finish()
        self.stream.close()


def opening(card: pb.ModelCard, session: str, **changes: object) -> pb.Open:
    """What a good client opens its session with, except for `changes`."""
    offer = card.cuts[0]
    good: dict[str, object] = {
        "protocol": PROTOCOL,
        "session": session,
        "bottom": offer.bottom,
        "top": offer.top,
        "model_digest": card.model_digest,
        "codec_activation": "none",
        "codec_gradient": "none",
    }
    return pb.Open(**(good | changes))  # type: ignore[arg-type]


def identity(owner: Path, name: str) -> Credentials:
    """The credentials of one of the owner's identities."""
    return Credentials.load(owner / name)


def hidden(*lengths: int, seed: int = 0) -> torch.Tensor:
    """Hidden states of rows of these lengths: [N, D]."""
    return torch.randn(sum(lengths), HIDDEN, generator=torch.Generator().manual_seed(seed))


def request(
    microbatch: int,
    tensors: Iterable[torch.Tensor],
    kind: "pb.Pass.ValueType" = pb.PASS_FORWARD,
    rows: Iterable[int] = (),
    codec: str = "none",
    **fields: object,
) -> list[pb.ClientFrame]:
    """The frames of a request: the call, then its chunks."""
    packed = [pack(tensor, codec) for tensor in tensors]
    key = pb.Key(microbatch=microbatch, pass_kind=kind)
    call = pb.Call(
        key=key,
        tensors=[header for header, _ in packed],
        rows=pb.Rows(row_lengths=list(rows)),
        **fields,  # type: ignore[arg-type]
    )
    chunks = split(key, [payload for _, payload in packed])
    return [pb.ClientFrame(call=call), *(pb.ClientFrame.FromString(serialise(chunk)) for chunk in chunks)]
