"""One round as an edge lives it: join, a fresh key for each attempt, others' keys checked, masked integers, the sum.

Knows the order of calls and what to believe; opens no connection and trains nothing. What it sends is bound, by a
salted hash, to one difference for each round: after a crash the same is sent or none.
"""

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from isthmus.errors import RunError, UnreachableError, WireError
from isthmus.faults import Fault, passing
from isthmus.rounds.masks import Attempt, masked
from isthmus.rounds.quantised import average, digest_of, quantise
from isthmus.rounds.signed_keys import checked, identity_of, require_cohort, roster_of, signed, terms_digest
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb

log = logging.getLogger(__name__)

POLL_S: Final = (0.1, 2.0)
"""First and longest pause between questions of how a round stands."""

Values = Mapping[str, torch.Tensor]
State = pb.RoundState


class Calls(Protocol):
    """What a node answers; `RoundCalls` over the wire."""

    def join(self, request: pb.RoundJoin) -> pb.RoundState: ...  # noqa: D102
    def keys(self, request: pb.RoundKey) -> pb.RoundState: ...  # noqa: D102
    def submit(self, request: pb.RoundSubmit) -> pb.RoundState: ...  # noqa: D102
    def result(self, request: pb.RoundAsk) -> pb.RoundSum: ...  # noqa: D102


@dataclass(frozen=True)
class Averaged:
    """What a round gave: the average, of how many edges, whether this one's is in it, and the run that it was of."""

    values: dict[str, torch.Tensor]
    edges: int
    counted: bool
    run: str


class EdgeInRound:
    """One edge in one round."""

    def __init__(
        self,
        calls: Calls,
        credentials: Credentials,
        terms: pb.RoundTerms,
        number: int,
        start: Values,
        difference: Values,
        cohort: int,
        run: str | None = None,
    ) -> None:
        """Take part with a difference.

        Args:
            calls: the node's answers.
            credentials: this edge's, whose key signs and whose authority is believed.
            terms: what all edges agree on.
            number: of the round, from 1.
            start: values that it begins with.
            difference: to those, the same names.
            cohort: the fewest edges to take part with.
            run: the id of the run so far; None: this is its first round.
        """
        self._calls, self._credentials, self._terms, self._number = calls, credentials, terms, number
        self._difference, self._cohort, self._run = difference, cohort, run
        self._me = identity_of(credentials)
        self._bound_to = terms_digest(terms, digest_of(start))
        self._key = X25519PrivateKey.generate()
        self._answered = 0
        self._submission: pb.RoundSubmit | None = None
        self._edges = 0
        self._join = pb.RoundJoin(
            terms=terms,
            round=number,
            cohort=cohort,
            start=digest_of(start),
            commitment=self._commitment(),
            process=secrets.token_hex(8),
        )

    def carry_out(self, patience_s: float, sleep: Callable[[float], None] = time.sleep) -> Averaged:
        """The average of the round.

        Raises:
            UnreachableError: the round is not done in `patience_s` seconds.
            LimitError, WireError, CertificateError: the cohort is too small, or a key of it is not to be believed.
            IsthmusError: the node refuses, or is away.
        """
        until, pause_s = time.monotonic() + patience_s, POLL_S[0]
        while True:
            state = self._calls.join(self._join)
            if self._take(state):
                return self._result(state)
            if time.monotonic() > until:
                raise UnreachableError(
                    f"round {self._number} of {self._terms.name} was not done in {patience_s:.0f} s, with "
                    f"{state.edges} edges there; resume when the others are"
                )
            sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S[1])

    def step(self) -> bool:
        """Do what is due now; returns whether the round is done."""
        return self._take(self._calls.join(self._join))

    def _take(self, state: State) -> bool:
        if self._run not in (None, state.run):
            raise RunError(f"{self._terms.name} is another run than the one that this began in; begin anew too")
        self._run = state.run
        while state.stage == State.STAGE_KEYS and state.attempt > self._answered:
            state = self._calls.keys(self._fresh_key(state.attempt))
        if state.stage == State.STAGE_SUMS and state.attempt == self._answered and not state.mine:
            passing(Fault.ROUND_BEFORE_SUBMIT)
            state = self._calls.submit(self._masked(state))
            passing(Fault.ROUND_AFTER_SUBMIT)
        return bool(state.stage == State.STAGE_DONE)

    def _fresh_key(self, number: int) -> pb.RoundKey:
        """A key for an attempt, which no other attempt has."""
        self._key, self._answered, self._submission = X25519PrivateKey.generate(), number, None
        public = self._key.public_key().public_bytes_raw()
        return signed(self._credentials, self._terms.name, self._attempt(), self._bound_to, public)

    def _masked(self, state: State) -> pb.RoundSubmit:
        if self._submission is None:
            others = self._believed(state.keys)
            self._edges = len(others) + 1
            plain = quantise(self._difference, self._terms.clip, self._edges)
            hidden = masked(plain, self._me, self._key, others, self._attempt(), roster_of(state.keys))
            self._submission = pb.RoundSubmit(
                name=self._terms.name,
                run=self._run,
                round=self._number,
                attempt=self._answered,
                masked=hidden.astype("<u4").tobytes(),
            )
        return self._submission

    def _believed(self, keys: Iterable[pb.RoundKey]) -> dict[str, bytes]:
        """The others' public keys by identity, if all are signed for this attempt and there are enough."""
        ca, name, attempt = self._credentials.ca, self._terms.name, self._attempt()
        found = [(checked(key, ca, name, attempt, self._bound_to), key.public_key) for key in keys]
        require_cohort([identity for identity, _ in found], self._cohort)
        by_identity = dict(found)
        if len(set(by_identity.values())) < len(found):
            raise WireError("two edges of this round have one key; take no part, and ask the model owner")
        if by_identity.pop(self._me, None) != self._key.public_key().public_bytes_raw():
            raise WireError("the node shows another key than this edge sent; take no part, and ask the model owner")
        return by_identity

    def _result(self, state: State) -> Averaged:
        ask = pb.RoundAsk(name=self._terms.name, run=self._run, round=self._number)
        found = self._calls.result(ask)
        if found.mine and self._edges not in (0, found.edges):
            raise WireError("the round's sum is of other edges than sent keys; ask the model owner")
        if self._submission is not None and not found.mine:
            log.warning("round %d was done without this edge, which had sent its part", self._number)
        if len(found.sum) != 4 * self._terms.values:
            raise WireError("the round's sum has another length than what was sent; ask the model owner")
        total = np.frombuffer(found.sum, "<u4").astype(np.uint32)
        values = average(total, self._difference, self._terms.clip, found.edges)
        return Averaged(values, found.edges, found.mine, state.run)

    def _attempt(self) -> Attempt:
        return Attempt(self._run or "", self._number, self._answered)

    def _commitment(self) -> bytes:
        key = self._credentials.signing_key().private_bytes_raw()
        info = b"isthmus round commitment v1 " + f"{self._terms.name} {self._number}".encode()
        salt = HKDF(SHA256(), length=32, salt=None, info=info).derive(key)
        return hashlib.sha256(salt + self._bound_to + digest_of(self._difference)).digest()
