"""Sessions with lora ports by hand: questions as they come, and any answers, good or bad, in any order."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash

from edge_client.config import TrainConfig
from isthmus.ports import LORA, Port
from isthmus.wire.chunks import split
from isthmus.wire.frames import serialise
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack, unpack
from tests.bad_input.raw import Answer, Client, hidden, opening, request
from tests.faults.training import Learner, learning

ROWS = (5, 3)
TOKENS = sum(ROWS)
Q, K, V = ((2, f"self_attn.{name}_proj") for name in "qkv")
DOWN = (3, "mlp.down_proj")
GROUP = (K, Q, V)
"""Sites of one block that share their input, in the order in which ports are declared."""

SITES = (*GROUP, DOWN)
WIDTHS = {Q: 32, K: 16, V: 16, DOWN: 32}
INPUTS = {Q: 32, K: 32, V: 32, DOWN: 64}

Frames = list[pb.ClientFrame]
_names = itertools.count()


@dataclass
class Asked:
    """A question at ports, with its tensors' bytes."""

    header: pb.PortCall
    payload: bytearray = field(default_factory=bytearray)

    @property
    def whole(self) -> bool:
        """Whether all that the question announced is here."""
        return len(self.payload) == sum(header.size for header in self.header.tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the pass sends along."""
        ends = list(itertools.accumulate(header.size for header in self.header.tensors))
        return [
            unpack(header, self.payload[end - header.size : end], 1 << 30)
            for header, end in zip(self.header.tensors, ends, strict=True)
        ]

    @property
    def due(self) -> list[torch.Tensor]:
        """An answer of the right shapes that differs by question."""
        sites = [(self.header.block, module) for module in self.header.modules]
        widths = [WIDTHS[site] for site in sites]
        if self.header.backward:
            widths = [INPUTS[sites[0]]] if self.header.wanted else []
        tokens, generator = len(self.tensors[0]), torch.Generator().manual_seed(self.header.turn)
        return [0.1 * torch.randn(tokens, width, generator=generator) for width in widths]


class PortClient(Client):
    """A session whose passes may ask."""

    left = False

    def leave(self) -> None:
        """Break off, whatever waits; the session stays, as after a lost line."""
        self.left = True
        self.stream._call.cancel()
        self.stream.close()

    def __exit__(self, kind: object, *rest: object) -> None:
        if not self.left:
            super().__exit__(kind, *rest)

    def next(self) -> Answer | Asked:
        """The next whole message, a reply or a question; nothing else may come."""
        message: Answer | Asked | None = None
        while message is None or not message.whole:
            frame = self.stream.receive()
            assert frame is not None, "the stream ended"
            if frame.HasField("chunk"):
                assert message is not None, "a chunk before what it belongs to"
                message.payload += frame.chunk.data
                continue
            assert message is None, "one message inside another"
            message = Asked(frame.port) if frame.HasField("port") else Answer(frame.reply)
            assert frame.WhichOneof("body") in ("port", "reply"), frame
        return message

    def question(self) -> Asked:
        """The next message, which is a question."""
        asked = self.next()
        assert isinstance(asked, Asked), asked.reply
        return asked

    def reply(self) -> Answer:
        """The next message, which is an answer."""
        answer = self.next()
        assert isinstance(answer, Answer), answer.header
        return answer

    def begin(self, *frames: pb.ClientFrame) -> Asked:
        """Send a request; returns what its pass asks first."""
        self.stream.send(*frames)
        return self.question()

    def through(self, *frames: pb.ClientFrame) -> tuple[Answer, list[Asked]]:
        """Send frames, answer every question as is due, and return the reply and the questions."""
        self.stream.send(*frames)
        questions: list[Asked] = []
        while isinstance(message := self.next(), Asked):
            questions.append(message)
            self.stream.send(*answer(message, message.due))
        return message, questions

    def is_alive(self, nonce: int = 7) -> bool:
        """Whether the stream still answers, with nothing before that answer."""
        self.stream.send(pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=nonce)))
        frame = self.stream.receive()
        return frame is not None and frame.heartbeat.nonce == nonce


def wire_ports(sites: Sequence[tuple[int, str]] = SITES) -> list[pb.Port]:
    """Lora ports as a session declares them."""
    return [Port(block, module=module, kind=LORA).to_wire() for block, module in sites]


def port_opening(card: pb.ModelCard, name: str = "", **changes: object) -> pb.Open:
    """What a good client opens a session of a new name with, at `SITES`, except for `changes`."""
    name = name or f"dlora-{next(_names)}"
    return opening(card, name, **{"bottom": 1, "top": 1, "ports": wire_ports(), "codec_port": "none", **changes})


def answer(question: Asked, tensors: Sequence[torch.Tensor], codec: str = "none", turn: int | None = None) -> Frames:
    """The frames of an answer: its header, then its chunks."""
    packed = [pack(tensor, codec) for tensor in tensors]
    header = question.header
    given = pb.PortAnswer(
        key=header.key, turn=header.turn if turn is None else turn, tensors=[one for one, _ in packed]
    )
    return [pb.ClientFrame(port=given), *chunks(header.key, [payload for _, payload in packed])]


def chunks(key: pb.Key, payloads: Sequence[memoryview]) -> Frames:
    """The chunks of a message as frames."""
    return [pb.ClientFrame.FromString(serialise(chunk)) for chunk in split(key, payloads)]


def poisoned(frames: Frames, value: float) -> Frames:
    """The frames of a message whose first tensor holds `value` first, in good faith otherwise."""
    head, first, *rest = frames
    body = head.port if head.HasField("port") else head.call
    first.chunk.data = np.float32(value).tobytes() + first.chunk.data[4:]
    body.tensors[0].checksum = xxhash.xxh3_64_intdigest(first.chunk.data)
    return [head, first, *rest]


def forward(microbatch: int = 1, **changes: object) -> Frames:
    """A forward that a backward may follow."""
    given = {"keep": True, "input_gradient": True, **changes}
    return request(microbatch, [hidden(*ROWS)], rows=ROWS, **given)


def backward(microbatch: int = 1, **changes: object) -> Frames:
    """Its backward, which relies on what the cloud kept."""
    given = {"input_gradient": True, **changes}
    return request(microbatch, [hidden(*ROWS, seed=9)], pb.PASS_BACKWARD, **given)


@contextmanager
def adapting(config: TrainConfig) -> Iterator[Learner]:
    """A learner whose adapters answer at their ports, while in here."""
    with learning(config) as learner:
        assert learner.edge.adapters is not None
        learner.edge.adapters.attached()
        yield learner
