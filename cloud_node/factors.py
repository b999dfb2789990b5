"""The frozen factors around cores: made when a session first needs them, and held for all who ask for the same.

Knows spans, ports and a limit in bytes; knows no sessions and no turns. What sessions use cannot be let go of; what
none uses any more is, the longest unused first, when room is needed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from weakref import WeakValueDictionary

from cloud_node.span import Span
from isthmus.cores import Frozen, frozen_around
from isthmus.errors import LimitError
from isthmus.linears import Site
from isthmus.ports import Port

LEAST_BYTES = 1 << 28
"""Of all factors, however small the activation budget is."""

SHARE = 4
"""They may take the activation budget divided by this."""

Key = tuple[Site, int, str, int]


class Factors:
    """What was made for cores; any thread may ask, and one at a time makes."""

    def __init__(self, limit: int) -> None:
        """Hold at most so many bytes."""
        self._limit = limit
        self._alive: WeakValueDictionary[Key, Frozen] = WeakValueDictionary()  # what anybody holds
        self._held: OrderedDict[Key, Frozen] = OrderedDict()  # the latest asked for last
        self._making = Lock()

    @property
    def nbytes(self) -> int:
        """Of all that anybody holds."""
        return sum(one.nbytes for one in self._alive.values())

    def of(self, span: Span, ports: Sequence[Port]) -> dict[Site, Frozen]:
        """The factors around the cores at `ports`, in the span's dtype and on its device.

        Raises:
            UsageError: quantized weights have no singular vectors to read.
            LimitError: they do not fit beside those that other sessions use.
        """
        with self._making:
            return {(port.block, port.module): self._one(span, port) for port in ports}

    def _one(self, span: Span, port: Port) -> Frozen:
        site = port.block, port.module
        seed = port.seed if port.init == "random" else 0
        key = site, port.rank, port.init, seed
        frozen = self._alive.get(key)
        if frozen is None:
            frozen = frozen_around(span.module(site), span.linears[site], site, port.rank, port.init, seed).at(
                span.device, span.dtype
            )
            self._make_room(frozen.nbytes)
            self._alive[key] = frozen
        self._held[key] = frozen
        self._held.move_to_end(key)
        return frozen

    def _make_room(self, size: int) -> None:
        while self._held and self.nbytes + size > self._limit:
            self._held.popitem(last=False)  # gone where no session uses it
        if self.nbytes + size > self._limit:
            raise LimitError(
                f"factors of cores take more than {self._limit} bytes here; lower --rank, name fewer --targets, or "
                "come again when others are done"
            )
