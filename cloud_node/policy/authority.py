"""Whether a peer may do what it asks: the one place where a node's policy is held against a call.

Knows the policy, identities and what calls are about; computes nothing and opens nothing. Without a policy file every
identity may do all that the node offers.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cloud_node.policy.in_force import InForce
from cloud_node.policy.rules import Exchange, Method, Rights
from cloud_node.policy.tenant import Tenant
from cloud_node.session import Session
from isthmus.cut import Cut
from isthmus.errors import ForbiddenError, IsthmusError, LimitError
from isthmus.ports import ASKING, CORE, LORA, LORA_VALUES, TAP, VALUES
from isthmus.wire.gen import backbone_pb2 as pb

REASONS: Final = (
    *("right", "tokens_per_day", "sessions", "sequence_length", "tokens_in_flight", "bytes_per_second"),
    *("hidden_range", "gradients_per_input"),
)
"""Why a policy refuses, as its counters name it."""

EXCHANGES: Final[Mapping[str, Exchange]] = {LORA: "activations", CORE: "core", LORA_VALUES: "parameters"}
"""What a port of a kind is for."""

SESSIONS_AGAIN_S: Final = 5.0
LEAST_GRADIENTS: Final = 1024
"""Of one row, where the policy does not say; half the hidden size where that is more."""


class Authority:
    """A node's policy, held against calls.

    Attributes:
        now: the policy that holds.
        refused: how often it refused, by reason.
        charged_tokens: that were charged to daily budgets since the node started.
    """

    def __init__(
        self,
        file: Path | None = None,
        model: tuple[str, str] = ("", ""),
        hidden_size: int = 0,
        largest: Callable[[], Mapping[Cut, float]] = dict,
    ) -> None:
        """Go by a file.

        Args:
            file: the policy; None: everybody may do everything.
            model: name and digest of the one that is served.
            hidden_size: of the model.
            largest: finds the largest value that the model itself makes at each cut; called where it is needed.

        Raises:
            UsageError: the file does not hold a policy, or budgets cannot be remembered.
        """
        self.now = InForce(file, largest)
        self.refused = dict.fromkeys(REASONS, 0)
        self.charged_tokens = 0
        self._model, self._hidden_size = model, hidden_size
        self._tenants: dict[str, Tenant] = {}

    def rights(self, identity: str) -> Rights:
        """What a peer may do with the model that is served.

        Raises:
            ForbiddenError: nothing at all; the message says which line to add.
        """
        with self.refusing("right"):
            rights = self.now.policy.rights(identity)
            if not rights.model(*self._model):
                raise _forbidden(identity, f"use model {self._model[0]}", "models", self._model[0])
            return rights

    def card(self, identity: str, card: pb.ModelCard) -> pb.ModelCard:
        """A model card as one peer is shown it: its cuts, and limits that are its own."""
        rights = self.rights(identity)
        cuts = [offer for offer in card.cuts if rights.cut(Cut(offer.bottom, offer.top))]
        del card.cuts[:]
        card.cuts.extend(cuts)
        own, shown = rights.limits, card.limits
        shown.row_tokens = min(shown.row_tokens, own.sequence_length or shown.row_tokens)
        least = (each for each in (own.tokens_in_flight, own.tokens_per_day) if each is not None)
        shown.call_tokens = min(shown.call_tokens, *least, shown.call_tokens)
        return card

    def require_cut(self, identity: str, cut: Cut) -> None:
        """See that a peer may have what is at a cut.

        Raises:
            ForbiddenError: it may not.
        """
        rights = self.rights(identity)
        with self.refusing("right"):
            if not rights.cut(cut):
                raise _forbidden(identity, f"use cut {cut}", "cuts", f'"{cut}"')

    def require_emulator(self, identity: str, name: str, bundle: str) -> None:
        """See that a peer may have an emulator.

        Raises:
            ForbiddenError: it may not.
        """
        rights = self.rights(identity)
        with self.refusing("right"):
            if not rights.emulator(name, bundle):
                raise _forbidden(identity, f"have emulator {name}", "emulators", name)

    def require_submit(self, identity: str) -> None:
        """See that a peer may hand an adapter in.

        Raises:
            ForbiddenError: it may not.
        """
        rights = self.rights(identity)
        with self.refusing("right"):
            if not rights.submit:
                raise ForbiddenError(f"{identity} may not submit: ask the model owner to add `submit: true` to it")

    def require_round(self, identity: str, name: str) -> None:
        """See that a peer may take part in rounds of a name.

        Raises:
            ForbiddenError: it may not.
        """
        rights = self.rights(identity)
        with self.refusing("right"):
            if not rights.round(name):
                raise _forbidden(identity, f"take part in round {name[:64]}", "rounds", name[:64])

    def require_session(self, identity: str, opening: pb.Open | Session) -> None:
        """See that a peer may have such a session, whether it asks for one or has it.

        Raises:
            ForbiddenError: it may not.
        """
        cut = opening.cut if isinstance(opening, Session) else Cut(opening.bottom, opening.top)
        self.require_cut(identity, cut)
        rights, kinds = self.rights(identity), {port.kind for port in opening.ports}
        with self.refusing("right"):
            for names in _needed(opening.forward_only, kinds):
                if not rights.method(*names):
                    raise _forbidden(identity, f"train by {names[0]}", "methods", names[0])
            for kind in sorted(EXCHANGES.keys() & kinds):
                if not rights.exchange(name := EXCHANGES[kind]):
                    raise _forbidden(identity, f"exchange {name}", "exchanges", name)

    def require_pass(self, session: Session, kind: int) -> Rights:
        """See that a session's owner may ask for a pass now; returns all that it may.

        Raises:
            ForbiddenError: it may not any more, or not in such a session.
        """
        rights = self.rights(session.identity)
        self.require_session(session.identity, session)
        with self.refusing("right"):
            if kind == pb.PASS_DECODE and not rights.method("decode"):
                raise _forbidden(session.identity, "decode", "methods", "decode")
            plain = session.forward_only and not session.ports
            if kind == pb.PASS_FORWARD and plain and not rights.method("top", "split"):
                raise _forbidden(session.identity, "run whole rows forward", "methods", "top")
        return rights

    def open(self, identity: str, opening: pb.Open, sessions: Iterable[Session]) -> None:
        """See that a peer may open a session beside those that are open.

        Raises:
            ForbiddenError: it may not.
            LimitError: it has as many as it may; says when to come again.
        """
        self.require_session(identity, opening)
        most = self.rights(identity).limits.sessions
        mine = {session.name for session in sessions if session.identity == identity}
        with self.refusing("sessions"):
            if most is not None and opening.session not in mine and len(mine) >= most:
                raise LimitError(f"{identity} has {most} open sessions, which is its limit", SESSIONS_AGAIN_S)

    def tenant(self, identity: str) -> Tenant:
        """What is remembered of a tenant."""
        return self._tenants.setdefault(identity, Tenant())

    async def paced(self, identity: str, size: int) -> None:
        """Wait until a peer may move so many bytes of a bundle.

        Raises:
            ForbiddenError: it may do nothing here, or not any more.
        """
        rate, pace = self.rights(identity).limits.bytes_per_second, self.tenant(identity).pace
        if (wait_s := pace.wait_s(rate)) > 0:
            await asyncio.sleep(wait_s)
        pace.take(size)

    async def arriving(self, identity: str, frames: AsyncIterator[pb.BundleFrame]) -> AsyncIterator[pb.BundleFrame]:
        """A bundle's frames, taken no faster than their sender may."""
        async for frame in frames:
            await self.paced(identity, len(frame.data))
            yield frame

    def gradients_of(self, rights: Rights) -> int | None:
        """How many gradients one row of hidden states is given; None: any number."""
        if self.now.file is None:
            return None
        return rights.limits.gradients_per_input or max(LEAST_GRADIENTS, self._hidden_size // 2)

    @contextmanager
    def refusing(self, reason: str) -> Iterator[None]:
        """Count a refusal in here."""
        try:
            yield
        except IsthmusError:
            self.refused[reason] += 1
            raise


def _needed(forward_only: bool, kinds: set[str]) -> list[tuple[Method, ...]]:
    """The methods that a session needs: of each group one. Who may train by `split` may also run forward only."""
    needed: list[tuple[Method, ...]] = []
    if kinds & {*ASKING, *VALUES}:
        needed.append(("dlora",))
    if TAP in kinds:
        needed.append(("side",))
    if not needed:
        needed.append(("top", "split", "decode") if forward_only else ("split",))
    return needed


def _forbidden(identity: str, what: str, key: str, value: str) -> ForbiddenError:
    return ForbiddenError(f"{identity} may not {what}: ask the model owner to add {value} to its `{key}:`")
