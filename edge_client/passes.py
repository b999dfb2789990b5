"""The span's passes over a link, as blocking calls.

Knows requests of a session and their answers' shapes; knows no autograd, no model and no optimizer.
"""

import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from edge_client.link import Link
from edge_client.pending import Answer, Received
from edge_client.port_adapters import PortWork
from edge_client.turns import Turns
from isthmus.errors import NotKeptError, UnreachableError, WireError
from isthmus.ledger.record import Ledger, Phase
from isthmus.rows import Rows
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import Encoded
from isthmus.wire.tensors import pack as encode

VALUE_BYTES = 4
"""A value of an answer at most."""

ANSWER_WITHIN_S = 1800.0
"""Longest wait for one answer while the server shows signs of life."""


@dataclass
class Sent:
    """A forward request that a backward may follow.

    Attributes:
        microbatch: its id.
        header, payload, rows: what was sent.
        kept: whether the cloud kept the activations.
        work: of the adapters in the span, where there are any.
        below: whether the gradient of what was sent is wanted.
    """

    microbatch: int
    header: pb.Tensor
    payload: memoryview
    rows: Rows
    kept: bool
    work: PortWork | None
    below: bool


class Crossed(NamedTuple):
    """A tensor, and how it crossed."""

    tensor: torch.Tensor
    encoded: Encoded


@dataclass
class Sequence:
    """The cloud's cache of one generation: its id, its width there, and the request that made it so."""

    name: str
    width: int
    after: int


class RemoteBackbone:
    """The span's passes as blocking calls; any number of threads may be in one.

    Attributes:
        phase: what is being done; bytes are counted under it.
        step: of training, from 1; the server's log names it.
        turns: a thread that computes gives up its turn here while it waits.
    """

    def __init__(
        self, link: Link, ledger: Ledger, codec_activation: str, codec_gradient: str, codec_port: str = "none"
    ) -> None:
        """Speak through a link, in phase `train` until told otherwise."""
        self._link = link
        self._ledger = ledger
        self._codec_activation = codec_activation
        self._codec_gradient = codec_gradient
        self._codec_port = codec_port
        self._parked: tuple[pb.Call, list[memoryview]] | None = None
        self._parking = threading.Lock()
        self._ids = itertools.count(1)
        self._waited = threading.local()
        self.phase: Phase = "train"
        self.step = 0
        self.turns = Turns()

    def __deepcopy__(self, _: dict[int, Any]) -> "RemoteBackbone":
        """A copied model speaks through the same line."""
        return self

    @property
    def waited_s(self) -> float:
        """Seconds that this thread has waited for the cloud, and then for its turn to compute."""
        return getattr(self._waited, "seconds", 0.0)

    def forward(
        self, hidden_ND: torch.Tensor, rows: Rows, keep: bool, work: PortWork | None = None, below: bool = True
    ) -> tuple[torch.Tensor, Sent]:
        """Run the span's forward pass: [N, D] to [wanted, D] in the same dtype and place.

        Args:
            hidden_ND: what goes in.
            rows: of these tokens.
            keep: a backward will follow.
            work: answers at the ports, where there are any.
            below: that backward shall give the gradient of what goes in.
        """
        microbatch = next(self._ids)
        header, payload = encode(hidden_ND.detach(), self._codec_activation)
        call = self._call(microbatch, pb.PASS_FORWARD, [header], work, below and keep)
        call.rows.CopyFrom(rows.to_wire())
        call.keep = keep
        received = self._answered(call, [payload], work)
        output_KD = _checked(received, (rows.returned, hidden_ND.shape[1]), hidden_ND)
        return output_KD, Sent(microbatch, header, payload, rows, received.kept, work, below)

    def park(self, adapters: list[tuple[torch.Tensor, torch.Tensor]], bitmap: bytes) -> None:
        """Leave frozen adapters with the cloud, for all later requests; those left before are forgotten there.

        Args:
            adapters: down [R, I] and up [O, R] of each, its scale in it.
            bitmap: the ports that they belong to, as `PortAdapters.bitmap` names them.
        """
        if not adapters:
            self._parked = None
            return
        encoded = [encode(matrix.detach(), "none") for pair in adapters for matrix in pair]
        key = pb.Key(microbatch=next(self._ids), pass_kind=pb.PASS_PARK)
        call = pb.Call(key=key, tensors=[header for header, _ in encoded], ports=bitmap)
        self._parked = (call, [payload for _, payload in encoded])
        self._park_again()

    def attach(self, values: list[torch.Tensor], bitmap: bytes) -> None:
        """Let all later requests be computed with an adapter's values, until their gradients are gathered.

        Args:
            values: as `isthmus.attached` has them, port by port.
            bitmap: the ports that they belong to, as `PortAdapters.bitmap` names them.
        """
        self._parked = None
        if values:
            encoded = [encode(value, "none") for value in values]
            key = pb.Key(microbatch=next(self._ids), pass_kind=pb.PASS_VALUES)
            call = pb.Call(key=key, tensors=[header for header, _ in encoded], ports=bitmap, step=self._step())
            self._parked = (call, [payload for _, payload in encoded])
            self._park_again()

    def attach_again(self) -> None:
        """Send the values again, which the cloud has lost."""
        self._park_again()

    def gather(self, microbatches: list[int]) -> list[torch.Tensor]:
        """The gradients of the values, summed over the backwards of these requests; the cloud forgets both.

        Raises:
            NotKeptError: it has lost some.
        """
        if self._parked is None:
            return []
        values, payloads = self._parked
        key = pb.Key(microbatch=next(self._ids), pass_kind=pb.PASS_GRADIENTS)
        call = pb.Call(key=key, parts=microbatches, parked=values.key.microbatch, step=self._step())
        size = sum(payload.nbytes for payload in payloads)
        received = self._wait(self._link.request(call, [], self.phase, size, most_tensors=len(payloads)))
        return received.tensors

    def _step(self) -> int:
        return self.step if self.phase == "train" else 0

    def _park_again(self) -> None:
        """Send what is parked; a server that was restarted has forgotten it."""
        with self._waiting(), self._parking:  # two requests of one id at once would be one
            if self._parked is not None:
                call, payloads = self._parked
                self._wait(self._link.request(call, payloads, self.phase))

    def _call(
        self, microbatch: int, kind: "pb.Pass", headers: list[pb.Tensor], work: PortWork | None, below: bool
    ) -> pb.Call:
        call = pb.Call(key=pb.Key(microbatch=microbatch, pass_kind=kind), tensors=headers, step=self._step())
        if work is not None:
            call.ports, call.input_gradient = work.bitmap, below
            call.parked = self._parked[0].key.microbatch if self._parked is not None else 0
        return call

    def _answered(
        self, call: pb.Call, payloads: list[memoryview], work: PortWork | None, whole: bool = True
    ) -> Received:
        """Send a request and wait; one that lacks nothing but parked adapters, being `whole`, is sent again with them.

        Raises:
            NotKeptError: the cloud has lost what else it builds on.
        """
        try:
            return self._wait(self._request(call, payloads, work), work)
        except NotKeptError:
            if not (call.parked and whole):
                raise
        self._park_again()
        return self._wait(self._request(call, payloads, work), work)

    def _request(self, call: pb.Call, payloads: list[memoryview], work: PortWork | None) -> "Future[Received]":
        return self._link.request(call, payloads, self.phase, answer=self._answer(work) if work is not None else None)

    def _answer(self, work: PortWork) -> Answer:
        def answer(ask: pb.PortCall, tensors: list[torch.Tensor]) -> list[Encoded]:
            return [encode(tensor, self._codec_port) for tensor in work.answer(ask, tensors)]

        return answer

    def ask_apart(self, hidden_ND: torch.Tensor, rows: Rows, widths: tuple[int, ...]) -> "Future[Received]":
        """Begin a forward pass that no backward follows and whose rows are answered apart; see `take_apart`."""
        header, payload = encode(hidden_ND.detach(), self._codec_activation)
        key = pb.Key(microbatch=next(self._ids), pass_kind=pb.PASS_FORWARD)
        call = pb.Call(key=key, tensors=[header], rows=rows.to_wire(), apart=True)
        return self._link.request(call, [payload], self.phase, VALUE_BYTES * rows.tokens * sum(widths))

    def take_apart(self, asked: "Future[Received]", rows: Rows, widths: tuple[int, ...]) -> Iterator[list[Crossed]]:
        """Wait for each row's tensors: the output [wanted, D] and, with taps, those [tokens, W]; `widths` are D and W.

        Raises:
            WireError: the answer has other shapes.
        """
        received = self._wait(asked)
        parts = [Crossed(*part) for part in zip(received.tensors, received.encoded, strict=True)]
        due: list[tuple[int, int]] = []
        for length, returned in zip(*rows.apart(), strict=True):
            counts = (returned, length)[: len(widths)]  # outputs where wanted, taps of all tokens
            due += zip(counts, widths, strict=True)
        if [tuple(part.tensor.shape) for part in parts] != due:
            raise WireError(f"the server answered with other tensors than those of {len(rows.lengths)} rows")
        if not all(part.tensor.is_floating_point() for part in parts):
            raise WireError("the server answered with tensors that are no hidden states")
        yield from (parts[at : at + len(widths)] for at in range(0, len(parts), len(widths)))

    def backward(self, sent: Sent, grad_KD: torch.Tensor) -> torch.Tensor:
        """The gradient of `sent`'s input, of no rows where that is not wanted.

        Its input goes along where the cloud has not kept the activations.
        """
        header, payload = encode(grad_KD, self._codec_gradient)
        alone = self._call(sent.microbatch, pb.PASS_BACKWARD, [header], sent.work, sent.below)
        received: Received | None = None
        if sent.kept:
            with suppress(NotKeptError):  # the server was restarted in between
                received = self._wait(self._request(alone, [payload], sent.work), sent.work)
        again = partial(self._backward_whole, sent, header, payload)
        if received is None:
            received = again()
        if sent.work is not None:
            sent.work.passed(sent.microbatch, again)
        return _checked(received, (sent.rows.tokens if sent.below else 0, grad_KD.shape[1]), grad_KD)

    def _backward_whole(self, sent: Sent, header: pb.Tensor, payload: memoryview) -> Received:
        """Ask for a backward whose input goes along."""
        whole = self._call(sent.microbatch, pb.PASS_BACKWARD, [header, sent.header], sent.work, sent.below)
        whole.rows.CopyFrom(sent.rows.to_wire())
        self._ledger.add(self.phase, resent_bytes=sent.payload.nbytes)
        return self._answered(whole, [payload, sent.payload], sent.work)

    def decode(
        self, hidden_ND: torch.Tensor, rows: Rows, after: Sequence | None, work: PortWork | None = None
    ) -> tuple[torch.Tensor, Sequence]:
        """Run the span on tokens that continue `after`, or on whole rows that begin a sequence.

        Raises:
            NotKeptError: the cloud no longer has what `after` names.
        """
        microbatch = next(self._ids)
        header, payload = encode(hidden_ND.detach(), self._codec_activation)
        place = pb.Sequence(id=after.name if after else uuid.uuid4().hex)
        if after is not None:
            place.start, place.after = after.width, after.after
        call = self._call(microbatch, pb.PASS_DECODE, [header], work, False)
        call.rows.CopyFrom(rows.to_wire())
        call.sequence.CopyFrom(place)
        received = self._answered(call, [payload], work, whole=after is None)
        output_KD = _checked(received, (rows.returned, hidden_ND.shape[1]), hidden_ND)
        return output_KD, Sequence(place.id, place.start + rows.longest, microbatch)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """In here others compute; what passes until it is this thread's turn again is waiting."""
        began, before = time.perf_counter(), self.waited_s
        try:
            with self.turns.given_up():
                yield
        finally:
            self._waited.seconds = before + time.perf_counter() - began

    def _wait(self, future: "Future[Received]", work: PortWork | None = None) -> Received:
        """Wait for an answer."""
        with self._waiting():
            return self._awaited(future, work)

    def _awaited(self, future: "Future[Received]", work: PortWork | None) -> Received:
        """What adapters in the span compute in the meantime is not waiting."""
        began = time.perf_counter()
        before = (work.forward_s, work.backward_s) if work is not None else (0.0, 0.0)
        try:
            return future.result(ANSWER_WITHIN_S)
        except TimeoutError:
            raise UnreachableError(
                f"the server has not answered a request for {ANSWER_WITHIN_S:.0f} s; resume when it is well again"
            ) from None
        finally:
            waited = time.perf_counter() - began
            forward_s = work.forward_s - before[0] if work is not None else 0.0
            backward_s = work.backward_s - before[1] if work is not None else 0.0
            self._ledger.add(
                self.phase,
                edge_wait_s=max(0.0, waited - forward_s - backward_s),
                edge_forward_s=forward_s,
                edge_backward_s=backward_s,
            )


def _checked(received: Received, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    if len(received.tensors) != 1 or tuple(received.tensors[0].shape) != shape:
        shapes = [tuple(tensor.shape) for tensor in received.tensors]
        raise WireError(f"the server answered with tensors of shape {shapes} where {shape} was due")
    return received.tensors[0].to(like.device, like.dtype)
