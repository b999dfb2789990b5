"""Where a model is cut: which blocks the edge runs and which the cloud runs.

Knows block counts and nothing else: no tensors, no wire, no model classes.
"""

from dataclasses import dataclass

from isthmus.errors import CutError


@dataclass(frozen=True, order=True)
class Cut:
    """The first `bottom` and the last `top` blocks stay on the edge; the span between them is the cloud's."""

    bottom: int
    top: int

    @classmethod
    def parse(cls, text: str) -> "Cut":
        """Read `"2:2"`.

        Raises:
            CutError: the text is not two non-negative integers joined by a colon.
        """
        bottom, colon, top = text.partition(":")
        if not (colon and bottom.isdecimal() and top.isdecimal()):
            raise CutError(f"cut {text!r} is not of the form bottom:top, such as 2:2")
        return cls(int(bottom), int(top))

    def above(self, blocks: int) -> range:
        """Numbers of the blocks above the span in a model of `blocks` blocks."""
        return range(blocks - self.top, blocks)

    def span(self, blocks: int) -> range:
        """Block numbers of the span in a model of `blocks` blocks.

        Raises:
            CutError: nothing would be left for the cloud.
        """
        if self.bottom + self.top >= blocks:
            raise CutError(
                f"cut {self} leaves the cloud none of the model's {blocks} blocks; "
                f"choose bottom and top that add up to less than {blocks}"
            )
        return range(self.bottom, blocks - self.top)

    def ends(self, blocks: int) -> list[int]:
        """Block numbers of the ends, in order."""
        span = self.span(blocks)
        return [number for number in range(blocks) if number not in span]

    def __str__(self) -> str:
        return f"{self.bottom}:{self.top}"
