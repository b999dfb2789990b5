"""A request on its way: what to send, and what has arrived for it: its answer, and what it asks at its ports.

Knows messages and their parts; knows no stream, no counting and no trying again.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from edge_client.stream import Outgoing
from isthmus.errors import WireError
from isthmus.ledger.record import Phase
from isthmus.wire.chunks import Assembly, split
from isthmus.wire.frames import Chunk
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.status import read_failure
from isthmus.wire.tensors import Encoded, unpack

PASS_OF = {
    pb.PASS_FORWARD_PORT: pb.PASS_FORWARD,
    pb.PASS_BACKWARD_PORT: pb.PASS_BACKWARD,
    pb.PASS_DECODE_PORT: pb.PASS_DECODE,
}
"""The pass that asks at its ports."""

RequestId = tuple[int, int]
Answer: TypeAlias = Callable[[pb.PortCall, list[torch.Tensor]], list[Encoded]]
"""Answers what a running request asks at its ports: the question and its tensors to the tensors that are due."""

Question: TypeAlias = tuple[pb.PortCall, Assembly]
"""What a request asks at its ports, and its tensors as they arrive."""


@dataclass
class Received:
    """An answer: its tensors on the CPU and as they crossed, whether activations wait, and what it cost the cloud."""

    tensors: list[torch.Tensor]
    encoded: list[Encoded]
    kept: bool
    cost: pb.Cost


@dataclass
class Pending:
    """A request until it is answered.

    Attributes:
        size: the bytes that count against the server's limits.
        leaving: some of it is still to be sent on this stream.
        refused_since: when the server first said that it would take it later, by whoever's clock.
        waits: until it may be sent again.
        due: tensors of its answer, where it is not a pass's.
    """

    call: pb.Call
    payloads: list[memoryview]
    phase: Phase
    size: int
    answer: Answer | None = None
    future: "Future[Received]" = field(default_factory=Future)
    reply: pb.Reply | None = None
    assembly: Assembly | None = None
    asked: Question | None = None
    sent: bool = False
    leaving: bool = False
    refused_since: float | None = None
    waits: bool = False
    due: int | None = None

    @property
    def rank(self) -> int:
        """Its turn on the line: of requests that ask at ports the older goes first.

        So one is in its backward while others are in their forward, and as these load the two directions unevenly, and
        the other way round, together they use both.
        """
        return self.call.key.microbatch if self.answer is not None else 0

    @property
    def most_tensors(self) -> int:
        """Tensors that an answer may have: output and taps, of each row where rows are answered apart."""
        if self.due is not None:
            return self.due
        return 2 * len(self.call.rows.row_lengths) if self.call.apart else 2

    def frames(self) -> Iterator[Outgoing]:
        """What to send, the second time marked so."""
        again, self.leaving = self.sent, True
        yield Outgoing(pb.ClientFrame(call=self.call), self.phase, again)
        self.sent = True  # reached when the frame above has left the queue
        for chunk in split(self.call.key, self.payloads):
            yield Outgoing(chunk, self.phase, again)
        self.leaving = False

    def begin_anew(self) -> None:
        """Forget what a lost stream has brought."""
        self.reply = self.assembly = self.asked = None
        self.leaving = self.waits = False

    def take(self, answer: pb.Reply | Chunk, max_bytes: int) -> Received | None:
        """Add to the answer that it belongs to; gives it once it is whole.

        Raises:
            WireError: it breaks the contract.
            IsthmusError: the failure that the cloud named.
        """
        if isinstance(answer, Chunk):
            if self.assembly is None:
                raise WireError("the server sent a chunk before the answer that it belongs to")
            self.assembly.add(answer)
        elif answer.HasField("failure"):
            raise read_failure(answer.failure)
        else:
            self.assembly = Assembly(answer.tensors, max_bytes, self.most_tensors)
            self.reply = answer
        if self.reply is None or not self.assembly.complete:
            return None
        encoded = self.assembly.encoded()
        tensors = [unpack(header, payload, max_bytes) for header, payload in encoded]
        return Received(tensors, encoded, self.reply.kept, self.reply.cost)

    def be_asked(self, asked: pb.PortCall | Chunk, max_bytes: int) -> Question:
        """Add to the question that it belongs to; tells it, whole or not.

        Raises:
            WireError: it breaks the contract.
        """
        if isinstance(asked, pb.PortCall):
            if self.answer is None:
                raise WireError("the server asks at ports that were not opened")
            self.asked = (asked, Assembly(asked.tensors, max_bytes))
            return self.asked
        if self.asked is None:
            raise WireError("the server sent a chunk before the question that it belongs to")
        self.asked[1].add(asked)
        return self.asked


def request_id(key: pb.Key) -> RequestId:
    """The request that a frame belongs to, what it asks at its ports included."""
    return key.microbatch, PASS_OF.get(key.pass_kind, key.pass_kind)


def at_port(part: pb.PortCall | Chunk) -> bool:
    """Whether a frame is of a question at a port, and not of an answer."""
    return isinstance(part, pb.PortCall) or part.key.pass_kind in PASS_OF


def place_of(question: pb.PortCall) -> str:
    """Where the ledger counts what a question moves: its block."""
    return str(question.block)
