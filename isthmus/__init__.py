"""The ground that both sides of Isthmus share: the cut, the wire, the ledger, the report and trust.

Imports neither side.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("isthmus")
except PackageNotFoundError:  # run from a tree that was never installed
    __version__ = "0+unknown"

PROTOCOL = 1
"""Version of the wire contract; peers with another one are refused."""
