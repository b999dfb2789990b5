"""What `doctor` knows of one server while it looks: verdicts, and what later checks take from earlier ones.

Knows no check; each stands with its kind in `doctor_here`, `doctor_line` and `doctor_served`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from isthmus.errors import IsthmusError
from isthmus.ledger.record import Ledger
from isthmus.trust.address import split_address
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb

if TYPE_CHECKING:
    from edge_client.link import Link
    from edge_client.passes import RemoteBackbone

Outcome = Literal["pass", "warn", "fail", "skip"]

Told = Callable[[str], None]
"""Told in words how far a check is that takes long."""


@dataclass(frozen=True)
class Verdict:
    """What a check found, in one line that names the remedy where one is needed.

    Attributes:
        figures: what was measured, for programs.
    """

    outcome: Outcome
    says: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Patient:
    """One server as this edge sees it.

    Attributes:
        credentials: this edge's identity, once it is read; None in plaintext.
        card: what the server said of its model.
        clock_s: by how much the server's clock is ahead of this one, in seconds; None where it does not say.
        round_trip_s: of the smallest message, once it is measured.
        link: an open session, forward-only, which is closed in the end.
        passes: over that session; one for all checks, for it numbers the requests.
    """

    server: str
    certs: Path | None
    insecure: bool
    cache: Path
    told: Told
    credentials: Credentials | None = None
    card: pb.ModelCard | None = None
    clock_s: float | None = None
    round_trip_s: float = 0.0
    link: "Link | None" = None
    passes: "RemoteBackbone | None" = None
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def host(self) -> str:
        """Of the server."""
        return split_address(self.server)[0]

    @property
    def port(self) -> int:
        """Of the server."""
        return split_address(self.server)[1]

    @property
    def described(self) -> pb.ModelCard:
        """The card, for checks that come after it.

        Raises:
            IsthmusError: there is none.
        """
        if self.card is None:
            raise IsthmusError("the server was not described")
        return self.card

    @property
    def session(self) -> "Link":
        """The session, for checks that come after it.

        Raises:
            IsthmusError: there is none.
        """
        if self.link is None:
            raise IsthmusError("no session was opened")
        return self.link
