"""How many edges a round has, and how large a change may be: what settings must know without computing anything."""

from typing import Final

FEWEST: Final = 3
"""Edges in a sum: of two, each knows the other's."""
MOST_EDGES: Final = 64
LARGEST_CLIP: Final = 1024.0
"""At most 64 edges then leave a grid of at least 2^-16."""
