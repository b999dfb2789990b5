"""The emulators that a server offers, as people choose among them.

Knows one call and what `emulator.json` says; fetches no weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from edge_client.opening import checked_credentials
from edge_client.server import list_emulators
from isthmus.cut import Cut
from isthmus.emulated.recipe import Emulator
from isthmus.ledger.record import Ledger


@dataclass(frozen=True)
class Offer:
    """An emulator on offer: its name, its bundle's id and bytes (the ends included), the cut, and what it is."""

    name: str
    bundle: str
    bytes: int
    cut: str
    about: Emulator

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "about": self.about.model_dump(mode="json")}


def offered(server: str, certs: Path | None, insecure: bool) -> list[Offer]:
    """What a server offers, in its order.

    Raises:
        IsthmusError: it cannot be reached or refuses, or says something malformed.
    """
    offers = list_emulators(server, checked_credentials(server, certs, insecure), Ledger())
    return [
        Offer(
            offer.name, offer.bundle, offer.bytes, str(Cut(offer.bottom, offer.top)), Emulator.parse(offer.description)
        )
        for offer in offers
    ]


def printable(words: str) -> str:
    """A server's words with nothing in them that a terminal would obey."""
    return words.encode("unicode_escape").decode("ascii")


def table(offers: list[Offer]) -> Table:
    """The offers for a terminal: sizes beside the true span's, and how much worse each is on its owner's text."""
    shown = Table("name", "cut", "method", "blocks", "to fetch", "FLOPs of the span's", "gap, nats per token")
    for offer in offers:
        about = offer.about
        recipe, share = about.recipe, about.flops_per_token / max(1, about.span_flops_per_token)
        method = f"{recipe.method}, {recipe.bits} bits" if recipe.bits is not None else recipe.method
        gap = f"{about.distance.gap:+z.3f}" if about.distance is not None else "not measured"
        blocks = f"{len(recipe.kept)} of {len(recipe.blocks)}"
        shown.add_row(
            Text(printable(offer.name)), offer.cut, method, blocks, f"{offer.bytes / 1e6:.1f} MB", f"{share:.0%}", gap
        )
    return shown
