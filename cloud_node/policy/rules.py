"""What a policy file says: for each tenant what it may use and how much of it; whoever is not named may do nothing.

Knows YAML, names and numbers; knows no session, no clock and no model.
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from isthmus.cut import Cut
from isthmus.errors import ForbiddenError, UsageError
from isthmus.settings import read_yaml

ANY: Final = "*"
"""In a list: all that the node has."""

Method: TypeAlias = Literal["split", "top", "side", "dlora", "decode"]
METHODS: Final[tuple[Method, ...]] = ("split", "top", "side", "dlora", "decode")
"""As the wire shows them: `top` is a session that runs forward only, `side` one with taps, `dlora` one with ports at
which passes wait for the edge, `decode` the request that continues a text in any of these."""

Exchange: TypeAlias = Literal["activations", "core", "parameters"]
EDGE: Final = "spiffe://isthmus/edge/"
MARGIN: Final = 1000.0

Count: TypeAlias = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """How much a tenant may ask; what is not named is bounded by the node alone.

    Attributes:
        tokens_per_day: positions of passes, from one UTC midnight to the next.
        sessions: open at once.
        sequence_length: tokens in one row, context included.
        tokens_in_flight: of unanswered requests of all sessions.
        bytes_per_second: of requests, answers and downloads, both directions together.
        gradients_per_input: backward passes that one row of hidden states is given, repeats not counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tokens_per_day: Count | None = None
    sessions: Count | None = None
    sequence_length: Count | None = None
    tokens_in_flight: Count | None = None
    bytes_per_second: Count | None = None
    gradients_per_input: Count | None = None


class Rights(BaseModel):
    """What one tenant may do. A list that is absent is empty: nothing of that kind is allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    models: list[str] = []
    methods: list[Method | Literal["*"]] = []
    exchanges: list[Exchange | Literal["*"]] = []
    cuts: list[str] = []
    emulators: list[str] = []
    submit: bool = False
    rounds: list[str] = []
    limits: Limits = Limits()

    @field_validator("cuts")
    @classmethod
    def _cuts_parse(cls, cuts: list[str]) -> list[str]:
        return [cut if cut == ANY else str(Cut.parse(cut)) for cut in cuts]

    def model(self, name: str, digest: str) -> bool:
        """Whether a model may be used, by its folder's name or its digest."""
        return bool({ANY, name, digest} & set(self.models))

    def method(self, *names: Method) -> bool:
        """Whether one of these may be used."""
        return bool({ANY, *names} & set(self.methods))

    def exchange(self, name: Exchange) -> bool:
        """Whether ports of this kind may be asked at."""
        return bool({ANY, name} & set(self.exchanges))

    def cut(self, cut: Cut) -> bool:
        """Whether the ends of a cut may be had, and sessions opened at it."""
        return bool({ANY, str(cut)} & set(self.cuts))

    def emulator(self, name: str, bundle: str) -> bool:
        """Whether an emulator may be had, by its folder's name or its bundle's id."""
        return bool({ANY, name, bundle} & set(self.emulators))

    def round(self, name: str) -> bool:
        """Whether rounds of this name may be taken part in, and their sums had."""
        return bool({ANY, name} & set(self.rounds))


class Policy(BaseModel):
    """A whole file.

    Attributes:
        tenants: by SPIFFE URI, or by the name after edge/.
        default: of those that are not named, where even that is wanted.
        usage: the file that remembers what was used of daily budgets; beside the policy's own if it is not named.
        hidden_margin: how many times the largest value that the model itself makes a hidden state may hold; 0: any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tenants: dict[str, Rights] = {}
    default: Rights | None = None
    usage: str | None = None
    hidden_margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = MARGIN

    @field_validator("tenants", mode="before")
    @classmethod
    def _nothing_is_no_rights(cls, tenants: Any) -> Any:
        """A name with nothing behind it may do nothing, as YAML's nothing is not a mapping."""
        if not isinstance(tenants, dict):
            return {} if tenants is None else tenants
        return {name: {} if rights is None else rights for name, rights in tenants.items()}

    @field_validator("tenants")
    @classmethod
    def _named_once(cls, tenants: dict[str, Rights]) -> dict[str, Rights]:
        if len({identity_of(name) for name in tenants}) < len(tenants):
            raise UsageError("a tenant is named twice, by its name and by its URI")
        return tenants

    def rights(self, identity: str) -> Rights:
        """What a peer may do.

        Raises:
            ForbiddenError: it is not named, and there is no default.
        """
        found = self._by_identity.get(identity, self.default)
        if found is None:
            name = identity.removeprefix(EDGE)
            raise ForbiddenError(
                f"{identity} is not in this node's policy: ask the model owner to add `{name}:` under `tenants:`"
            )
        return found

    @cached_property
    def _by_identity(self) -> dict[str, Rights]:
        return {identity_of(name): rights for name, rights in self.tenants.items()}

    @property
    def counts_days(self) -> bool:
        """Whether anybody's tokens are counted by the day."""
        everybody = [*self.tenants.values(), *([self.default] if self.default is not None else [])]
        return any(rights.limits.tokens_per_day is not None for rights in everybody)


def identity_of(name: str) -> str:
    """The identity that a file's name for a tenant means; `anonymous` is a peer in plaintext."""
    return name if "://" in name or name == "anonymous" or name.startswith("cn:") else EDGE + name


def read_policy(file: Path) -> Policy:
    """A policy file.

    Raises:
        UsageError: it cannot be read, a key is unknown or a value does not fit; the message names the key.
    """
    try:
        return Policy.model_validate(read_yaml(file))
    except ValidationError as error:
        raise UsageError(f"{file}: {_in_words(error)}") from None


def _in_words(error: ValidationError) -> str:
    problems = error.errors()
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    place = ".".join(str(part) for part in first["loc"] if not _is_choice(part))
    if first["type"] == "extra_forbidden":
        return f"no key {place!r}; known there are {', '.join(_known_at(first['loc'][:-1]))}"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}" if place else first["msg"]


def _is_choice(part: object) -> bool:
    """Whether a part of a place is pydantic's name for one choice of several."""
    return isinstance(part, str) and part.startswith("literal[")


def _known_at(place: tuple[Any, ...]) -> list[str]:
    if not place:
        return list(Policy.model_fields)
    within = place[-1] == "limits" and place[:-1] != ("tenants",)  # a tenant may be called so
    return list(Limits.model_fields if within else Rights.model_fields)
