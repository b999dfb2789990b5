"""What an emulator cost its owner, as far as the edge was told: with the offer, or by a record beside a folder.

Knows records and where they are kept; believes nothing in them that is not of this emulator. Nobody signs a record: a
malformed one is left out with a warning, for nothing depends on it.
"""

import logging
from contextlib import suppress
from pathlib import Path

from edge_client.config import BUNDLE_ID
from edge_client.offering import printable
from isthmus.command import cache_directory
from isthmus.durable import write_whole
from isthmus.errors import BundleError
from isthmus.ledger import told
from isthmus.ledger.told import Told

log = logging.getLogger(__name__)


def keep(emulator: str, content: bytes) -> None:
    """Keep what a server told with its offer of an emulator, if it told anything, for this run and later ones."""
    if content and BUNDLE_ID.fullmatch(emulator) and _believed(emulator, content, told.MAX_SENT_BYTES) is not None:
        place = _place(emulator)
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, content)


def kept(emulator: str) -> Told | None:
    """What a server told with its offer of an emulator, in this run or an earlier one; None where none did."""
    return _read(emulator, _place(emulator))


def beside(emulator: str, folder: Path) -> Told | None:
    """What the record beside a folder says; None where there is none."""
    return _read(emulator, told.beside(folder))


def _place(emulator: str) -> Path:
    return cache_directory() / "costs" / f"{emulator}{told.ENDING}"


def _read(emulator: str, place: Path) -> Told | None:
    try:
        with place.open("rb") as file:
            content = file.read(told.MAX_BYTES + 1)
    except OSError:
        return None
    return _believed(emulator, content, told.MAX_BYTES)


def _believed(emulator: str, content: bytes, limit: int) -> Told | None:
    try:
        found = told.parse(content, limit)
    except BundleError as error:
        log.warning("what the emulator cost its owner is not told: %s", printable(str(error)))
        return None
    if found.of != emulator:
        log.warning("what the emulator cost its owner is not told: the record is of another emulator")
        return None
    return found
