"""Questions that a running pass puts to the edge at its ports, until they are answered.

Knows requests by name, tensors as they cross and how long to wait; knows no model and no stream. A question outlives
the stream that carried it: whoever sends the request again is asked again.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from isthmus.errors import IsthmusError, LimitError, WireError
from isthmus.round_trips import Question
from isthmus.wire.chunks import Assembly, split
from isthmus.wire.frames import Chunk
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack

ANSWER_WITHIN_S = 300.0
"""How long a pass waits at a port, its client's reconnecting included."""

PORT_OF = {
    pb.PASS_FORWARD: pb.PASS_FORWARD_PORT,
    pb.PASS_BACKWARD: pb.PASS_BACKWARD_PORT,
    pb.PASS_DECODE: pb.PASS_DECODE_PORT,
}

IGNORED = 1 << 12
"""Answers to no question that a stream bears before it ends."""

FLOATS = ("float32", "bfloat16", "float16")

PassId = tuple[int, int]
"""A request's microbatch, and the pass's port."""


@dataclass
class Ask:
    """One question; `due` are the shapes of its answer."""

    header: pb.PortCall
    payloads: list[memoryview]
    due: list[tuple[int, int]]
    carrier: object = None  # the stream that it was sent on
    answer: "Future[Assembly]" = field(default_factory=Future)

    def frames(self) -> Iterator[pb.ServerFrame | Chunk]:
        """What to send."""
        yield pb.ServerFrame(port=self.header)
        yield from split(self.header.key, self.payloads)

    def begin(self, answer: pb.PortAnswer, max_bytes: int) -> Assembly:
        """Judge an answer's headers.

        Raises:
            WireError: other tensors than those that are due.
        """
        shapes = [tuple(header.shape) for header in answer.tensors[: len(self.due) + 1]]
        if shapes != self.due or any(header.dtype not in FLOATS for header in answer.tensors):
            raise WireError(f"a port of block {self.header.block} was answered with {shapes} where {self.due} are due")
        return Assembly(answer.tensors, max_bytes, len(self.due))


class Asks:
    """A session's open questions, at most one for each pass that runs; any thread may use it."""

    def __init__(self) -> None:
        self._open: dict[PassId, Ask] = {}
        self._ended: IsthmusError | None = None
        self._send: Callable[[Ask], None] = lambda _: None

    def resume(self, send: Callable[[Ask], None]) -> None:
        """Ask by `send`, which reaches the session's present stream and which any thread may call."""
        self._send, self._ended = send, None

    def pause(self, send: Callable[[Ask], None], error: IsthmusError) -> None:
        """As `end`, until the next stream, if the present one is still that of `send`."""
        if self._send is send:
            self.end(error)

    def put(self, ask: Ask) -> None:
        """Ask.

        Raises:
            IsthmusError: the session has ended.
        """
        self._open[pass_id(ask.header.key)] = ask
        if self._ended is not None:
            raise type(self._ended)(*self._ended.args)
        self._send(ask)

    def find(self, pass_: PassId, turn: int | None = None) -> Ask | None:
        """The unanswered question of a pass, if it is the one of `turn`."""
        ask = self._open.get(pass_)
        return ask if ask is not None and not ask.answer.done() and turn in (None, ask.header.turn) else None

    def drop(self, ask: Ask) -> None:
        """Forget a question."""
        self._open.pop(pass_id(ask.header.key), None)

    def end(self, error: IsthmusError) -> None:
        """Fail what waits, and whatever is asked from now on."""
        self._ended = error
        for ask in list(self._open.values()):
            fail(ask, type(error)(*error.args))  # each its own: an error holds the frames that it went through


def give(ask: Ask, answer: Assembly) -> None:
    """Let the pass that asked go on, unless it was answered meanwhile."""
    with suppress(InvalidStateError):
        ask.answer.set_result(answer)


def fail(ask: Ask, error: IsthmusError) -> None:
    """Let the pass that asked end with an error, unless it was answered meanwhile."""
    with suppress(InvalidStateError):
        ask.answer.set_exception(error)


def pass_id(key: pb.Key) -> PassId:
    """A pass as a dictionary key."""
    return key.microbatch, key.pass_kind


class Answers:
    """What arrives on one stream in answer to a session's questions.

    An answer to no question that is open comes of asking twice, and is nothing; so are its chunks.
    """

    def __init__(self, asks: Asks, max_bytes: int) -> None:
        self._asks = asks
        self._max_bytes = max_bytes
        self._arriving: dict[PassId, tuple[Ask, Assembly]] = {}
        self._ignored = 0

    def begin(self, answer: pb.PortAnswer) -> None:
        """Take an answer's headers; other tensors than those that are due fail the pass that asked.

        Raises:
            WireError: too many answers were to no question.
        """
        pass_ = pass_id(answer.key)
        self._arriving.pop(pass_, None)
        ask = self._asks.find(pass_, answer.turn)
        if ask is None:
            self._ignored += 1
            if self._ignored > IGNORED:
                raise WireError(f"{IGNORED} answers at ports were to no question; mend the client")
            return
        try:
            self._arriving[pass_] = (ask, ask.begin(answer, self._max_bytes))
        except WireError as error:
            fail(ask, error)
            return
        self._finish_if_complete(pass_)

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk of an answer; one that does not follow fails the pass that asked."""
        pass_ = pass_id(chunk.key)
        if pass_ not in self._arriving:
            return
        ask, assembly = self._arriving[pass_]
        try:
            assembly.add(chunk)
        except WireError as error:
            del self._arriving[pass_]
            fail(ask, error)
            return
        self._finish_if_complete(pass_)

    def _finish_if_complete(self, pass_: PassId) -> None:
        ask, assembly = self._arriving[pass_]
        if assembly.complete:
            del self._arriving[pass_]
            give(ask, assembly)


class Line:
    """The way to the edge for one request; see `isthmus.round_trips.Edge`."""

    def __init__(self, key: pb.Key, asks: Asks, codec: str) -> None:
        """Put what the request `key` asks into `asks`."""
        self._key = pb.Key(microbatch=key.microbatch, pass_kind=PORT_OF[key.pass_kind])
        self._asks = asks
        self._codec = codec
        self._turn = 0

    def ask(self, question: Question) -> list[torch.Tensor]:
        """See `isthmus.round_trips.Edge`.

        Raises:
            LimitError: the edge did not answer in time.
            WireError: it answered with something else.
        """
        ask = self._asked(question)
        try:
            self._asks.put(ask)
            return ask.answer.result(ANSWER_WITHIN_S).tensors()
        except TimeoutError:
            raise LimitError(
                f"no answer at a port of block {question.block} for {ANSWER_WITHIN_S:.0f} s; send the request again"
            ) from None
        finally:
            self._asks.drop(ask)
            del ask  # else an error in it and this frame hold each other, and the pass's graph

    def _asked(self, question: Question) -> Ask:
        self._turn += 1
        encoded = [pack(tensor, self._codec) for tensor in question.tensors]
        header = pb.PortCall(
            key=self._key,
            turn=self._turn,
            block=question.block,
            modules=question.modules,
            backward=question.backward,
            wanted=question.wanted,
            tensors=[header for header, _ in encoded],
        )
        tokens = len(question.tensors[0])
        return Ask(header, [payload for _, payload in encoded], [(tokens, width) for width in question.widths])
