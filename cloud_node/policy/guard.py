"""A session's requests on one stream, held against its owner's limits before anything computes.

Knows requests, rows of hidden states and what the policy grants; knows no engine and no frames.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
import xxhash

from cloud_node.policy.authority import Authority
from cloud_node.policy.rules import Rights
from cloud_node.session import RequestId, Session, digest_of, request_id
from isthmus.errors import LimitError, WireError
from isthmus.rows import Rows
from isthmus.wire.gen import backbone_pb2 as pb

IN_FLIGHT_AGAIN_S: Final = 1.0
"""When a tenant with too much under way may come again: its own answers decide, which nobody can foretell."""


class Guard:
    """What one stream of a session may still ask."""

    def __init__(self, authority: Authority, session: Session) -> None:
        self._authority = authority
        self._session = session
        self._tenant = authority.tenant(session.identity)
        self._in_flight: dict[int, tuple[RequestId, int]] = {}  # unanswered: its id and tokens, by the call's identity

    def begin(self, call: pb.Call) -> None:
        """Judge a request by its headers, and count it as unanswered.

        Raises:
            ForbiddenError: its owner may not ask this, or not any more.
            LimitError: it is too much, now or at all.
        """
        rights, tokens = self._authority.require_pass(self._session, call.key.pass_kind), tokens_of(call)
        limits, refusing = rights.limits, self._authority.refusing
        with refusing("sequence_length"):
            self._require_length(call, limits.sequence_length)
        in_flight = 0 if request_id(call.key) in self._session.running else tokens  # one that runs already is counted
        with refusing("tokens_in_flight"):
            self._require_room(self._key(call), in_flight, limits.tokens_in_flight)
        with refusing("tokens_per_day"):
            if (usage := self._authority.now.usage) is not None and limits.tokens_per_day is not None:
                usage.require(self._session.identity, self._key(call), tokens, limits.tokens_per_day)
        with refusing("bytes_per_second"):
            self._require_pace(limits.bytes_per_second)
        self.sent(sum(header.size for header in call.tensors))
        self._in_flight[id(call)] = request_id(call.key), in_flight
        self._tenant.room.take(self._key(call), in_flight)

    def charge(self, call: pb.Call) -> None:
        """Charge a request that is complete to its owner's day, unless it was.

        Raises:
            ForbiddenError: its owner may not ask it any more.
            LimitError: it would be too much.
        """
        rights, usage = self._authority.require_pass(self._session, call.key.pass_kind), self._authority.now.usage
        most = rights.limits.tokens_per_day
        if most is None or usage is None:
            return
        with self._authority.refusing("tokens_per_day"):
            added = usage.charge(self._session.identity, self._key(call), tokens_of(call), most)
        self._authority.charged_tokens += added

    def sent(self, size: int) -> None:
        """Count bytes of a request or an answer."""
        self._tenant.pace.take(size)

    def done(self, call: pb.Call) -> None:
        """A request is answered or refused."""
        _, tokens = self._in_flight.pop(id(call), (None, 0))
        self._tenant.room.give(tokens)

    def close(self) -> None:
        """The stream is gone, and what was unanswered on it with it; what still runs counts until it has run."""
        for request, tokens in self._in_flight.values():
            running = self._session.running.get(request)
            if running is None:
                self._tenant.room.give(tokens)
            else:
                running.add_done_callback(partial(self._ran, tokens))
        self._in_flight.clear()

    def _ran(self, tokens: int, _: object) -> None:
        self._tenant.room.give(tokens)

    def look(self, call: pb.Call, hidden_ND: torch.Tensor, rows: Rows) -> None:
        """Judge the hidden states of a request, [tokens, hidden]; called where it computes.

        Raises:
            WireError: a value is larger than any that the model could make.
            LimitError: a row was given as many gradients as it may.
        """
        bound = self._authority.now.bounds.get(self._session.cut)
        with self._authority.refusing("hidden_range"):
            if bound is not None and _largest(hidden_ND) > bound:
                raise WireError(
                    f"a hidden state holds a value beyond {bound:.4g}, which this model does not come near; "
                    "check the ends, lower the learning rate, or ask the model owner for more `hidden_margin`"
                )
        if self._most_gradients is None:
            return
        if call.key.pass_kind == pb.PASS_BACKWARD:
            brought, known = _hashes(hidden_ND, rows), self._tenant.gradients.find(*self._forward(call))
            self._count(call, brought)
            if known is not None and list(known) != brought:  # the engine goes by the forward that it kept
                self._count(call, known)
        elif call.key.pass_kind == pb.PASS_FORWARD and call.keep:
            self._tenant.gradients.ran(*self._forward(call), _hashes(hidden_ND, rows))

    def look_back(self, call: pb.Call) -> None:
        """Judge a backward of a forward that is kept, which brings no hidden states.

        Raises:
            NotKeptError: that forward is forgotten here.
            LimitError: a row was given as many gradients as it may.
        """
        if self._most_gradients is not None:
            self._count(call, self._tenant.gradients.rows_of(*self._forward(call)))

    def _count(self, call: pb.Call, rows: Sequence[bytes]) -> None:
        most = self._most_gradients
        with self._authority.refusing("gradients_per_input"):
            if most is not None:
                once = _digest(self._session.name.encode(), digest_of(call), b"".join(rows))
                self._tenant.gradients.count(once, rows, most)

    @property
    def _most_gradients(self) -> int | None:
        return self._authority.gradients_of(self._rights())

    def _rights(self) -> Rights:
        return self._authority.rights(self._session.identity)

    def _key(self, call: pb.Call) -> bytes:
        """What a request is, however often it comes; with another input it is another."""
        return _digest(self._session.name.encode(), digest_of(call, whole=True))

    def _forward(self, call: pb.Call) -> tuple[str, int]:
        return self._session.name, call.key.microbatch

    def _require_length(self, call: pb.Call, most: int | None) -> None:
        reach = max([*call.rows.starts, call.sequence.start]) + max(call.rows.row_lengths, default=0)
        if most is not None and reach > most:
            raise LimitError(f"a row reaches position {reach}; {self._session.identity} may have rows of {most}")

    def _require_room(self, key: bytes, tokens: int, most: int | None) -> None:
        if most is None or not tokens:
            return
        if tokens > most:
            raise LimitError(
                f"a request of {tokens} tokens; {self._session.identity} may have {most} in flight: send fewer rows"
            )
        if not self._tenant.room.has(key, tokens, most):
            raise LimitError(
                f"{self._session.identity} has {self._tenant.room.tokens} tokens in flight and may have {most}",
                IN_FLIGHT_AGAIN_S,
            )

    def _require_pace(self, rate: int | None) -> None:
        wait_s = self._tenant.pace.wait_s(rate)
        if wait_s > 0:
            raise LimitError(f"{self._session.identity} may move {rate:,} bytes a second; this is too soon", wait_s)


def tokens_of(call: pb.Call) -> int:
    """Positions that a request is charged for; adapters that are parked or come for a step are none."""
    if call.key.pass_kind in (pb.PASS_PARK, pb.PASS_VALUES):
        return 0
    return max((int(tensor.shape[0]) for tensor in call.tensors if tensor.shape), default=0)


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def _largest(hidden_ND: torch.Tensor) -> float:
    """The largest absolute value."""
    if not hidden_ND.numel():
        return 0.0
    low, high = torch.aminmax(hidden_ND)
    return max(-float(low), float(high))


def _hashes(hidden_ND: torch.Tensor, rows: Rows) -> list[bytes]:
    """A hash of each row."""
    parts = torch.split(hidden_ND.detach().cpu().contiguous(), list(rows.lengths))
    return [xxhash.xxh3_128_digest(part.view(torch.uint8).numpy().data) for part in parts]
