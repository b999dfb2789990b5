"""One run's rounds: who joined, whose keys and integers are here, who dropped out; a clock, and no transport.

A round gathers edges, takes a signed key of each, then masked integers of each, and sums them. Who is silent past the
deadline is left out, and the rest begin another attempt with keys of their own for it: masks of two never meet.
Only sums of whole attempts are ever made.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cloud_node.round_store import RoundStore, Sum
from isthmus.errors import ForbiddenError, LimitError, RepeatError, UsageError, WireError
from isthmus.rounds.limits import FEWEST, MOST_EDGES
from isthmus.rounds.masks import Attempt
from isthmus.rounds.signed_keys import checked, require_cohort, terms_digest
from isthmus.wire.gen import backbone_pb2 as pb

MOST_RESTARTS = 3
"""Of a process, that an edge may make a round begin again for; then it is left out of that round."""

State = pb.RoundState
Told = Callable[[str, str, int], None]
"""Told what happened, to whom, in which round."""


@dataclass
class Member:
    """An edge in a round."""

    process: str
    cohort: int
    key: pb.RoundKey | None = None
    masked: bytes | None = None
    restarts: int = 0

    def renewed(self) -> "Member":
        """For another attempt."""
        return Member(self.process, self.cohort, restarts=self.restarts)


class RoundRun:
    """The rounds of one name; not for several threads at once."""

    def __init__(
        self,
        name: str,
        store: RoundStore,
        terms: pb.RoundTerms,
        authorities: bytes,
        wait_s: float,
        told: Told,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Go on with a run that the store has, or begin one with these terms.

        Args:
            name: what --join names.
            store: where it is kept.
            terms: what all edges must agree on.
            authorities: certificates (PEM) that edges' are of.
            wait_s: for further edges, and for an edge that is silent.
            told: of edges left out and rounds done.
            clock: in seconds.
        """
        self._name, self._store, self._authorities = name, store, authorities
        self._wait_s, self._told, self._clock = wait_s, told, clock
        known = name in store.names()
        self._kept = store.load(name) if known else store.begin(name, terms.SerializeToString(deterministic=True))
        self._terms = pb.RoundTerms.FromString(bytes.fromhex(self._kept.terms))
        self._seen: set[str] = set()
        self._last: set[str] = set()
        self._gather({})

    def join(self, identity: str, asked: pb.RoundJoin) -> State:
        """Let an edge take part, or say how its round stands.

        Raises:
            WireError: its terms, or the values it begins with, are not the others'.
            RepeatError: it brings another difference to a round than before.
            UsageError: its round is not due yet.
        """
        if asked.terms != self._terms:
            raise WireError(f"round {self._name} is of another model, adapter, --clip or --round-every: use the same")
        if asked.round <= self._kept.done:
            return State(run=self._kept.run, round=asked.round, stage=State.STAGE_DONE, mine=True)
        if asked.round != self._kept.done + 1:
            raise UsageError(f"round {asked.round} of {self._name} is not due: the next is {self._kept.done + 1}")
        self._advance()
        self._bind(identity, asked.commitment)
        self._seen.add(identity)
        member = self._members.get(identity)
        if member is None and self._stage == State.STAGE_GATHERING and len(self._members) < MOST_EDGES:
            self._begin_with(asked.start)
            self._members[identity] = Member(asked.process, asked.cohort)
        elif member is not None and member.process != asked.process:
            self._again(identity, member, asked.process)
        self._advance()
        return self._state(identity)

    def key(self, identity: str, key: pb.RoundKey) -> State:
        """Take an edge's key for the present attempt; one for an earlier attempt is answered with how things stand.

        Raises:
            ForbiddenError: it is another edge's.
            CertificateError, WireError: it is not signed as it must be.
            RepeatError: it is another than before.
        """
        self._advance()
        member = self._members.get(identity)
        if member is None or self._stage == State.STAGE_GATHERING or not self._is_now(key.round, key.attempt):
            return self._state(identity)
        terms = terms_digest(self._terms, self._start)
        if checked(key, self._authorities, self._name, self._attempt, terms) != identity:
            raise ForbiddenError("a key is sent by the edge that signed it")
        if member.key is not None and member.key.public_key != key.public_key:
            raise RepeatError(f"this edge has sent another key for attempt {key.attempt}: begin again with --resume")
        if member.key is None:
            member.key = key
        if self._stage == State.STAGE_KEYS and all(each.key is not None for each in self._members.values()):
            self._enter(State.STAGE_SUMS)
        return self._state(identity)

    def submit(self, identity: str, sent: pb.RoundSubmit) -> State:
        """Take an edge's masked integers; the same may come again.

        Raises:
            RepeatError: it sent others before.
            WireError: there are not as many as the run has values.
        """
        if len(sent.masked) != 4 * self._terms.values:
            raise WireError(
                f"a submission to {self._name} has {self._terms.values} integers of 4 bytes; match the runs"
            )
        if sent.round <= self._kept.done:
            return self._submitted_before(identity, sent)
        self._advance()
        member = self._members.get(identity)
        if member is None or self._stage != State.STAGE_SUMS or not self._is_now(sent.round, sent.attempt):
            return self._state(identity)
        if member.masked is not None and member.masked != sent.masked:
            raise RepeatError(f"this edge has sent something else in attempt {sent.attempt}; it counts, and stays")
        member.masked = sent.masked
        if all(each.masked is not None for each in self._members.values()):
            self._finish()
            return State(run=self._kept.run, round=sent.round, stage=State.STAGE_DONE, mine=True)
        return self._state(identity)

    def result(self, identity: str, number: int) -> pb.RoundSum:
        """The sum of a round that is done.

        Raises:
            UsageError: it is not.
            BundleError: it is kept no more.
        """
        if not 1 <= number <= self._kept.done:
            raise UsageError(f"round {number} of {self._name} is not done")
        found = self._store.sum_of(self._name, number)
        return pb.RoundSum(sum=found.total, edges=len(found.submissions), mine=identity in found.submissions)

    @property
    def run(self) -> str:
        """Its id."""
        return self._kept.run

    def _bind(self, identity: str, commitment: bytes) -> None:
        said = self._kept.commitments.setdefault(identity, commitment.hex())
        if said != commitment.hex():
            raise RepeatError(
                f"this edge has brought another change to round {self._kept.done + 1}; go on with --resume"
            )
        self._store.save(self._name, self._kept)

    def _begin_with(self, start: bytes) -> None:
        if not self._members:
            self._start = start
            self._enter(State.STAGE_GATHERING)  # patience counts from the first who is there
        elif start != self._start:
            raise WireError("this run begins the round with other values than the others: give all the same --seed")

    def _again(self, identity: str, member: Member, process: str) -> None:
        """An edge is back as another process: the keys of the one before are lost."""
        member.process = process
        if self._stage == State.STAGE_GATHERING or member.key is None or member.masked is not None:
            return
        member.restarts += 1
        if member.restarts > MOST_RESTARTS:
            self._leave_out({identity})
        else:
            self._attempt_with(self._members)

    def _advance(self) -> None:
        late = self._clock() >= self._deadline
        if self._stage == State.STAGE_GATHERING:
            need = max([FEWEST, *(each.cohort for each in self._members.values())])
            whole = self._last and self._last <= set(self._members)
            if len(self._members) >= need and (late or whole or len(self._members) == MOST_EDGES):
                self._attempt_with(self._members)
        elif late:
            keys = self._stage == State.STAGE_KEYS
            self._leave_out(
                {name for name, each in self._members.items() if (each.key if keys else each.masked) is None}
            )

    def _leave_out(self, lost: set[str]) -> None:
        for identity in sorted(lost):
            self._told("round-left-out", identity, self._kept.done + 1)
        rest = {name: each for name, each in self._members.items() if name not in lost}
        try:
            require_cohort(rest, max((each.cohort for each in rest.values()), default=FEWEST))
        except LimitError:
            self._gather(rest)
        else:
            self._attempt_with(rest)

    def _gather(self, members: dict[str, Member]) -> None:
        self._members = {name: each.renewed() for name, each in members.items()}
        self._start = self._start if members else b""
        self._enter(State.STAGE_GATHERING)

    def _attempt_with(self, members: dict[str, Member]) -> None:
        self._kept.attempts += 1  # saved first: no number is ever used twice
        self._store.save(self._name, self._kept)
        self._members = {name: each.renewed() for name, each in members.items()}
        self._enter(State.STAGE_KEYS)

    def _enter(self, stage: State.Stage) -> None:
        self._stage, self._deadline = stage, self._clock() + self._wait_s

    def _finish(self) -> None:
        sent = {name: each.masked or b"" for name, each in self._members.items()}
        total = np.zeros(self._terms.values, np.uint32)
        for masked in sent.values():
            total += np.frombuffer(masked, "<u4").astype(np.uint32)
        digests = {name: hashlib.sha256(masked).hexdigest() for name, masked in sent.items()}
        done = Sum(total.astype("<u4").tobytes(), self._kept.attempts, digests)
        self._store.add(self._name, self._kept, done)
        self._told("round-done", "node", self._kept.done)
        self._last, self._seen = self._seen, set()
        self._gather({})

    def _submitted_before(self, identity: str, sent: pb.RoundSubmit) -> State:
        done = self._store.sum_of(self._name, sent.round)
        known = done.submissions.get(identity)
        if sent.attempt == done.attempt and known not in (None, hashlib.sha256(sent.masked).hexdigest()):
            raise RepeatError(f"this edge has sent something else in round {sent.round}, which is done")
        return State(run=self._kept.run, round=sent.round, stage=State.STAGE_DONE, mine=known is not None)

    def _is_now(self, number: int, attempt: int) -> bool:
        return number == self._kept.done + 1 and attempt == self._kept.attempts

    @property
    def _attempt(self) -> Attempt:
        return Attempt(self._kept.run, self._kept.done + 1, self._kept.attempts)

    def _state(self, identity: str) -> State:
        member, stage = self._members.get(identity), self._stage
        state = State(run=self._kept.run, round=self._kept.done + 1, attempt=self._kept.attempts, stage=stage)
        state.edges = len(self._members)
        if member is None:
            state.stage = State.STAGE_LEFT_OUT
            return state
        if stage == State.STAGE_SUMS:
            state.keys.extend(each.key for each in self._members.values() if each.key is not None)
        state.mine = (member.masked if stage == State.STAGE_SUMS else member.key) is not None
        return state
