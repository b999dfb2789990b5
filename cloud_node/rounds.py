"""The gRPC face of rounds: who may take part in which, and how much of it a node takes.

Knows identities, the policy and runs by name; what becomes of a call is decided in `round_run`. It sees masked integers
and their sums, and writes down neither.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from cloud_node.audit import Audit
from cloud_node.policy.authority import Authority
from cloud_node.round_run import RoundRun
from cloud_node.round_store import RoundStore
from cloud_node.sending import abort
from cloud_node.session import require_protocol
from isthmus.errors import ForbiddenError, IsthmusError, LimitError, ModelError, WireError
from isthmus.rounds.limits import FEWEST, LARGEST_CLIP, MOST_EDGES
from isthmus.rounds.quantised import MOST_VALUES
from isthmus.trust.credentials import Credentials, peer_identity
from isthmus.trust.profiles import NAME, SPIFFE
from isthmus.wire.gen import backbone_pb2 as pb

MOST_RUNS = 64
WAIT_S = 60.0
DIGEST_BYTES = 32
MOST_PROCESS_LETTERS = 64

Answer = TypeVar("Answer", bound=Message)


class RoundService:
    """Answers the four calls of the contract."""

    def __init__(
        self,
        directory: Path | None,
        credentials: Credentials | None,
        model_digest: str,
        authority: Authority,
        audit: Audit,
        wait_s: float = WAIT_S,
    ) -> None:
        """Hold rounds that are kept in `directory`; without one, or without certificates, every call is refused.

        Raises:
            BundleError: the directory cannot be written.
        """
        ready = directory is not None and credentials is not None
        self._store = RoundStore(directory) if ready and directory is not None else None
        self._authorities = credentials.ca if credentials is not None else b""
        self._model_digest, self._authority, self._audit, self._wait_s = model_digest, authority, audit, wait_s
        self._runs: dict[str, RoundRun] = {}
        self._turn = asyncio.Lock()

    async def Join(self, request: pb.RoundJoin, context: Any) -> pb.RoundState:  # noqa: N802 (gRPC's name)
        """Take part in a round, or ask how it stands."""
        return await self._answer(self._join, request, context)

    async def Keys(self, request: pb.RoundKey, context: Any) -> pb.RoundState:  # noqa: N802
        """A signed key."""
        return await self._answer(self._key, request, context)

    async def Submit(self, request: pb.RoundSubmit, context: Any) -> pb.RoundState:  # noqa: N802
        """Masked integers."""
        return await self._answer(self._submit, request, context)

    async def Result(self, request: pb.RoundAsk, context: Any) -> pb.RoundSum:  # noqa: N802
        """The sum of a round that is done."""
        return await self._answer(self._result, request, context)

    def handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """The contract's calls, for a server."""
        kinds: dict[str, tuple[Any, type[Message], type[Message]]] = {
            "Join": (self.Join, pb.RoundJoin, pb.RoundState),
            "Keys": (self.Keys, pb.RoundKey, pb.RoundState),
            "Submit": (self.Submit, pb.RoundSubmit, pb.RoundState),
            "Result": (self.Result, pb.RoundAsk, pb.RoundSum),
        }
        calls = {
            name: grpc.unary_unary_rpc_method_handler(call, asked.FromString, answer.SerializeToString)
            for name, (call, asked, answer) in kinds.items()
        }
        return grpc.method_handlers_generic_handler("isthmus.v1.Rounds", calls)

    async def _answer(self, call: Callable[[str, Any], Answer], request: Any, context: Any) -> Answer:
        identity = peer_identity(context.auth_context())
        try:
            async with self._turn:
                return await asyncio.to_thread(call, identity, request)
        except IsthmusError as error:
            await abort(context, error)

    def _join(self, identity: str, request: pb.RoundJoin) -> pb.RoundState:
        terms = request.terms
        self._may(identity, terms.name)
        require_protocol(terms.protocol)
        if terms.model_digest != self._model_digest:
            raise ModelError("the round is of another model than this node's: join where the model is served")
        if not 1 <= terms.values <= MOST_VALUES:
            raise LimitError(f"{terms.values} values; a round takes 1 to {MOST_VALUES:,}: train fewer")
        sized = {len(each) for each in (terms.layout, request.start, request.commitment)} == {DIGEST_BYTES}
        if not (sized and 0 < terms.clip <= LARGEST_CLIP and terms.every and request.round):
            raise WireError("the round's terms make no sense; match the versions")
        if not 1 <= len(request.process) <= MOST_PROCESS_LETTERS:
            raise WireError("who joins a round names its process; match the versions")
        if not FEWEST <= request.cohort <= MOST_EDGES:
            raise LimitError(
                f"a round has {FEWEST} to {MOST_EDGES} edges, not {request.cohort}: choose another --cohort"
            )
        return self._run(terms).join(identity, request)

    def _key(self, identity: str, request: pb.RoundKey) -> pb.RoundState:
        return self._known(identity, request.name, request.run).key(identity, request)

    def _submit(self, identity: str, request: pb.RoundSubmit) -> pb.RoundState:
        return self._known(identity, request.name, request.run).submit(identity, request)

    def _result(self, identity: str, request: pb.RoundAsk) -> pb.RoundSum:
        return self._known(identity, request.name, request.run).result(identity, request.round)

    def _may(self, identity: str, name: str) -> RoundStore:
        self._authority.require_round(identity, name)
        if self._store is None:
            raise ForbiddenError("this node holds no rounds: ask the model owner to serve with --rounds and --certs")
        if not identity.startswith(SPIFFE):
            raise ForbiddenError("rounds are for edges with certificates of their own: give --certs DIR")
        if not NAME.fullmatch(name):
            raise WireError("a round's name is 1 to 63 of a-z, 0-9, '.', '_', '-': choose another --join")
        return self._store

    def _known(self, identity: str, name: str, run: str) -> RoundRun:
        store = self._may(identity, name)
        if name not in self._runs and name in store.names():
            self._runs[name] = self._made(store, pb.RoundTerms(name=name))
        found = self._runs.get(name)
        if found is None or found.run != run:
            raise WireError(f"there is no such run of {name} here: join it first")
        return found

    def _run(self, terms: pb.RoundTerms) -> RoundRun:
        store = self._may_begin(terms.name)
        if terms.name not in self._runs:
            self._runs[terms.name] = self._made(store, terms)
        return self._runs[terms.name]

    def _may_begin(self, name: str) -> RoundStore:
        if self._store is None:
            raise ForbiddenError("this node holds no rounds: ask the model owner to serve with --rounds and --certs")
        known = self._store.names()
        if name not in known and len(known) >= MOST_RUNS:
            raise LimitError(f"this node holds {MOST_RUNS} runs of rounds already: ask the model owner to remove some")
        return self._store

    def _made(self, store: RoundStore, terms: pb.RoundTerms) -> RoundRun:
        return RoundRun(terms.name, store, terms, self._authorities, self._wait_s, self._tell)

    def _tell(self, action: str, identity: str, number: int) -> None:
        self._audit.record(action, identity, round=number)
