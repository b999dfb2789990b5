"""What stands between the ledger's bytes and those that a network interface counts.

Knows the headers of Ethernet, IPv4, TCP, TLS 1.3 and HTTP/2, as gRPC sends them; measures nothing.
"""

from dataclasses import dataclass

PACKET_HEADERS = 14 + 20 + 20 + 12
"""Ethernet, IPv4, TCP, and TCP's option of timestamps, which Linux sends with each segment."""

SEGMENT_BYTES = 1500 - (PACKET_HEADERS - 14)
"""Of TCP's payload in a full segment, at Ethernet's usual 1,500 bytes."""

FRAME_HEADER, FRAME_BYTES = 9, 1 << 14
"""HTTP/2, RFC 9113: a frame's header, and its payload unless the two sides agree on more."""

RECORD_OVERHEAD, RECORD_BYTES = 5 + 1 + 16, (1 << 14) - 100
"""TLS 1.3, RFC 8446: a record's header, type and tag; and what gRPC puts into one, which leaves 100 bytes of room."""

HANDSHAKE_BYTES = 2_000
"""Each way and connection, about: a certificate on P-256 and its signature, HTTP/2's settings, a call's headers."""


@dataclass(frozen=True)
class Crossing:
    """One direction of a run, as the ledger has it and as the sender's interface counted it.

    Attributes:
        ledger: bytes in the ledger, gRPC's own prefix included.
        counted: bytes by the interface.
        packets: by the interface; those that carry nothing but an acknowledgement are among them.
        retransmitted: segments that were sent again.
        connections: that were opened.
    """

    ledger: int
    counted: int
    packets: int
    retransmitted: int
    connections: int

    @property
    def http2(self) -> int:
        """Bytes of frame headers."""
        return FRAME_HEADER * -(-self.ledger // FRAME_BYTES)

    @property
    def tls(self) -> int:
        """Bytes of records, and of the handshakes."""
        records = -(-(self.ledger + self.http2) // RECORD_BYTES)
        return RECORD_OVERHEAD * records + HANDSHAKE_BYTES * self.connections

    @property
    def headers(self) -> int:
        """Bytes of Ethernet, IPv4 and TCP."""
        return PACKET_HEADERS * self.packets

    @property
    def again(self) -> int:
        """Bytes of TCP's payload that crossed more than once."""
        return SEGMENT_BYTES * self.retransmitted

    @property
    def modelled(self) -> int:
        """What the interface should have counted."""
        return self.ledger + self.http2 + self.tls + self.headers + self.again

    @property
    def difference(self) -> float:
        """By what share of the counted bytes the model is above them, or below."""
        return self.modelled / self.counted - 1

    def __add__(self, other: "Crossing") -> "Crossing":
        return Crossing(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))
