"""Links by name, and as `RTT:UP:DOWN`: how long a message travels, and how fast bytes go each way.

Knows numbers and where they come from; carries nothing. `edge_client.pacing` holds real traffic back as they would.

| name | round trip, ms | up, Mbit/s | down, Mbit/s | source |
|---|---|---|---|---|
| loopback | 0.1 | 6400 | 6400 | a raw echo through one gRPC stream on one machine (`make bench`), rounded |
| fibre | 10 | 300 | 300 | typical, assumed |
| wifi | 20 | 50 | 100 | a home's, with a line of its own kind behind it: typical, assumed |
| 5g | 30 | 21 | 166 | Ookla, "The State of 5G Worldwide in 2021": medians; the round trip is assumed |
| 4g | 50 | 8.6 | 27 | Ookla, United States, all mobile, Q1-Q2 2018: means; the round trip is assumed |
| satellite | 45 | 10 | 100 | in low orbit: typical, assumed |
"""

from dataclasses import dataclass
from typing import Final, Self

from isthmus.errors import UsageError

MBIT: Final = 1e6 / 8

NAMED: Final[dict[str, tuple[float, float, float]]] = {
    "loopback": (0.1, 6400, 6400),
    "fibre": (10, 300, 300),
    "wifi": (20, 50, 100),
    "5g": (30, 21, 166),
    "4g": (50, 8.6, 27),
    "satellite": (45, 10, 100),
}
"""Milliseconds of a round trip, Mbit/s up and down; where they come from stands at the top of this file."""


@dataclass(frozen=True)
class Link:
    """A line: its round trip in seconds, and bytes a second up and down."""

    round_trip_s: float
    up: float
    down: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name of `NAMED`, or `"50:100:100"`: milliseconds of a round trip, Mbit/s up, Mbit/s down.

        Raises:
            UsageError: the text is neither a name nor three numbers, or a rate is not above 0.
        """
        round_trip_ms, up, down = NAMED.get(text) or _numbers(text)
        if not (0 <= round_trip_ms < 1e5 and 0 < up < 1e6 and 0 < down < 1e6):
            raise UsageError(
                f"--link {text!r:.40} is none of {', '.join(NAMED)}, and not of the form RTT:UP:DOWN in ms and Mbit/s, "
                "such as 50:100:100"
            )
        return cls(round_trip_ms / 1e3, up * MBIT, down * MBIT)


def _numbers(text: str) -> tuple[float, float, float]:
    try:
        round_trip_ms, up, down = map(float, text.split(":"))
    except ValueError:
        return -1.0, 0.0, 0.0
    return round_trip_ms, up, down
