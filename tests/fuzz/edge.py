"""Inputs for an edge, from a server that means it no good: model cards, lists, bundles and answers of any kind.

Knows a server that says whatever it is told to. The edge must end each call with an error of the catalogue, or take
what is harmless.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import torch
from google.protobuf.message import Message
from hypothesis import strategies as st

from cloud_node.calls import Limits
from edge_client import server as calls
from edge_client.link import Link
from isthmus import PROTOCOL
from isthmus.errors import IsthmusError
from isthmus.ledger.record import Ledger
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack
from tests.fuzz.inputs import any_message, damage, damaged
from tests.fuzz.target import Target, said

WITHIN_S = 30
KEY = pb.Key(microbatch=1, pass_kind=pb.PASS_FORWARD)


class Hostile:
    """Answers every call with the bytes in `says`; a session is opened properly first."""

    def __init__(self) -> None:
        self.says: list[bytes] = []
        self._server = grpc.server(ThreadPoolExecutor(4))
        whole = {name: grpc.unary_unary_rpc_method_handler(lambda _, __: self.says[0]) for name in ("Describe", "List")}
        frames = {
            name: grpc.unary_stream_rpc_method_handler(lambda _, __: self.says) for name in ("FetchEnds", "Fetch")
        }
        session = {"Exchange": grpc.stream_stream_rpc_method_handler(self._exchange)}
        for service in ("Backbone", "Offsite"):
            handlers = grpc.method_handlers_generic_handler(f"isthmus.v1.{service}", {**whole, **frames, **session})
            self._server.add_generic_rpc_handlers((handlers,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.stop(0)

    def _exchange(self, sent: Iterator[bytes], _: object) -> Iterator[bytes]:
        next(sent)
        yield pb.ServerFrame(opened=pb.Opened(server_version="x")).SerializeToString()
        for frame in sent:
            if pb.ClientFrame.FromString(frame).HasField("call"):
                yield from self.says
                return

    def asked(self, frames: list[bytes]) -> None:
        """Open a session and ask for a forward; the answer is these frames, and then the end."""
        self.says = frames
        link = Link(self.address, None, pb.Open(protocol=PROTOCOL, session="s"), Ledger(), Limits().to_wire(), 0.0)
        header, payload = pack(torch.ones(2, 32), "none")
        call = pb.Call(key=KEY, tensors=[header], rows=pb.Rows(row_lengths=[2]))
        try:
            _in_words(lambda: link.request(call, [payload], "train").result(WITHIN_S))
        finally:
            link.close()

    def told(self, content: bytes, call: Callable[[], object]) -> None:
        """Make a call whose answer is this."""
        self.says = [content]
        _in_words(call)


def _in_words(call: Callable[[], object]) -> None:
    try:
        call()
    except IsthmusError as error:
        said(error)


def answer() -> list[bytes]:
    """The frames of a good answer."""
    header, payload = pack(torch.ones(2, 32), "int8")
    reply = pb.Reply(key=KEY, tensors=[header], kept=True, cost=pb.Cost(forward_flops=5, forward_s=0.1))
    chunk = pb.Chunk(key=KEY, data=bytes(payload))
    return [pb.ServerFrame(reply=reply).SerializeToString(), pb.ServerFrame(chunk=chunk).SerializeToString()]


def targets(hostile: Hostile, card: pb.ModelCard, place: Path) -> Iterator[Target]:
    """Everything that an edge is told by a server."""
    frame = any_message(pb.ServerFrame).map(pb.ServerFrame.SerializeToString)
    harmed = damage().map(lambda changes: damaged(answer(), changes))
    yield Target("an edge's session", 3, st.one_of(harmed, st.lists(frame, min_size=1, max_size=3)), hostile.asked)
    described: Callable[[bytes], None] = lambda content: hostile.told(content, lambda: _describe(hostile.address))  # noqa: E731
    yield Target("an edge's model card", 2, _said(card), described)
    listed: Callable[[bytes], None] = lambda content: hostile.told(  # noqa: E731
        content, lambda: calls.list_emulators(hostile.address, None, Ledger())
    )
    offers = pb.EmulatorList(emulators=[pb.EmulatorOffer(bundle="0" * 64, bytes=3, bottom=1, top=1, name="x")])
    yield Target("an edge's list of emulators", 2, _said(offers), listed)


def _describe(address: str) -> None:
    card = calls.describe(address, None, Ledger())
    for asked in (None, "1:1"):
        calls.choose_cut(card, asked)


def _said(good: Message) -> "st.SearchStrategy[bytes]":
    harmed = damage().map(lambda changes: b"".join(damaged([good.SerializeToString()], changes)))
    return st.one_of(any_message(type(good)).map(lambda sent: sent.SerializeToString()), harmed)
