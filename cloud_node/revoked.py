"""Who is no longer let in: callers whose certificate is on the authority's list, also in sessions that are open.

Knows the list in the server's folder, which is read anew when its file changes; knows no sessions. A list that is there
and cannot be believed lets nobody in.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from isthmus.errors import CertificateError
from isthmus.trust import signing
from isthmus.trust.credentials import peer_serial
from isthmus.trust.revocation import FILE, read_list

log = logging.getLogger(__name__)

Peer = Mapping[str, Iterable[bytes]]
"""What `ServicerContext.auth_context()` says of a caller."""

REVOKED = "this certificate was revoked: ask the model owner for a new identity"
UNREADABLE = "the server cannot read its list of revoked certificates and lets nobody in: tell the model owner"


UNSEEN = (-1, -1)
"""A list of which not even the time can be had."""


class Revoked:
    """The list of one server; without a folder nobody is on it."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._seen: tuple[int, int] | None = None
        self._serials: frozenset[int] | None = frozenset()

    def require(self, peer: Peer) -> int | None:
        """Let a caller in; returns its certificate's serial number, None for a plaintext peer.

        Raises:
            CertificateError: it is on the list, or there is a list that cannot be believed.
        """
        serial = peer_serial(peer) if self._folder is not None else None
        if (why := self.why_not(serial)) is not None:
            raise CertificateError(why)
        return serial

    def why_not(self, serial: int | None) -> str | None:
        """Why a certificate is refused; None: it is not."""
        if self._folder is None or serial is None:
            return None
        self._look(self._folder)
        if self._serials is None:
            return UNREADABLE
        return REVOKED if serial in self._serials else None

    def _look(self, folder: Path) -> None:
        try:
            found = (folder / FILE).stat()
            seen = (found.st_mtime_ns, found.st_ino)
        except FileNotFoundError:
            seen = None
        except OSError as error:
            if self._serials is not None:
                log.error("%s: nobody is let in until then", error)  # noqa: TRY400 (a line, not a traceback)
            self._serials, self._seen = None, UNSEEN
            return
        if seen == self._seen and (self._serials is not None or seen is None):
            return
        try:
            self._serials = read_list(folder, signing.read_public(folder / "ca.pem"))
            log.info("%d certificates are revoked", len(self._serials))
        except CertificateError as error:
            if self._serials is not None:
                log.error("%s: nobody is let in until then", error)  # noqa: TRY400 (a line, not a traceback)
            self._serials = None
        self._seen = seen
