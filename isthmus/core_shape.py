"""What cores are like: their rank, and how the frozen factors around them are made.

Knows names and numbers; computes nothing.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

Init = Literal["svd", "random"]
INITS: Final[tuple[str, ...]] = get_args(Init)

MAX_RANK: Final = 256
"""Of a core: its factors are made when a session first asks at its port, and held for all who ask for the same."""


@dataclass(frozen=True)
class CoreShape:
    """Cores, and the frozen factors around them.

    Attributes:
        rank: R.
        init: how the factors are made: svd or random.
        seed: of those that are drawn.
        alpha: R times what a core's product is multiplied by.
    """

    rank: int
    init: str
    seed: int
    alpha: float

    @property
    def scale(self) -> float:
        """What a core's product is multiplied by."""
        return self.alpha / self.rank
