"""A session as the engine knows it: what it was opened for, what it has parked, and what its passes cost.

Knows spans, ports and FLOPs; knows no queue and no budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock

from cloud_node.engine import Asked, Opening
from cloud_node.span import Span
from isthmus.attached import Attached
from isthmus.cores import Frozen
from isthmus.errors import NotKeptError, WireError
from isthmus.ledger import span_flops
from isthmus.linears import Site
from isthmus.ports import CORE, TAP, VALUES, Port
from isthmus.round_trips import Parked
from isthmus.rows import Rows


@dataclass
class OpenSession:
    """One session.

    Attributes:
        name: its own.
        span: of its cut.
        opening: what it was opened for.
        keeps: it has asked to keep a forward.
        parked: adapters, and the request that left them.
        frozen: factors around the edge's cores, once they are made; None where it has whole adapters.
        attached: values that came for a step.
        unmeasured: held, before the device's turn and never within it, by a pass whose graph's size is not known.
    """

    name: str
    span: Span
    opening: Opening
    keeps: bool = False
    parked: tuple[int, dict[Site, Parked]] = (0, {})
    frozen: dict[Site, Frozen] | None = None
    attached: Attached | None = None
    unmeasured: Lock = field(default_factory=Lock)

    @property
    def ports(self) -> tuple[Port, ...]:
        """Its own."""
        return self.opening.ports

    @property
    def tapped(self) -> bool:
        """Whether its ports are taps."""
        return any(port.kind == TAP for port in self.ports)

    @property
    def cored(self) -> bool:
        """Whether the edge has cores at its ports."""
        return any(port.kind == CORE for port in self.ports)

    @property
    def storages(self) -> dict[int, int]:
        """Bytes of what it shares with others, hence of no graph of its own, by address."""
        matrices = [matrix for each in (self.frozen or {}).values() for matrix in (each.down_RI, each.up_OR)]
        held = [matrix.untyped_storage() for matrix in matrices]
        return {**self.span.storages, **{storage.data_ptr(): storage.nbytes() for storage in held}}

    @property
    def valued(self) -> bool:
        """Whether values of its adapters come for a step."""
        return any(port.kind in VALUES for port in self.ports)

    def attached_for(self, asked: Asked) -> Attached | None:
        """The values that a pass is computed with; None where it asks for none.

        Raises:
            NotKeptError: they are gone.
        """
        held = self.attached
        if asked.parked and (held is None or held.request != asked.parked):
            raise NotKeptError("the adapter's values are gone; send them again")
        return held if asked.parked else None

    def fitted(self, adapters: Mapping[Site, Parked]) -> dict[Site, Parked]:
        """Adapters as they can be parked: where the span is.

        Raises:
            WireError: one does not fit its module.
        """
        held = {}
        for site, adapter in adapters.items():
            linear = self.span.linears[site]
            rank = len(adapter.down_RI)
            if adapter.down_RI.shape != (rank, linear.inputs) or adapter.up_OR.shape != (linear.outputs, rank):
                raise WireError(f"a parked adapter does not fit {site[1]} of block {site[0]}")
            if rank > min(linear.inputs, linear.outputs):
                raise WireError(f"a parked adapter of rank {rank} is larger than {site[1]} of block {site[0]}")
            held[site] = Parked(adapter.down_RI.to(self.span.device), adapter.up_OR.to(self.span.device))
        return held

    @property
    def parked_bytes(self) -> int:
        """Of the adapters that it has parked, and of values and gradients of a step."""
        held = self.attached.nbytes if self.attached is not None else 0
        return held + sum(adapter.nbytes for adapter in self.parked[1].values())

    def beside_flops(self, rows: Rows, asked: Asked) -> int:
        """Floating-point operations of what is added without the edge, and around its cores, in one pass."""
        if self.valued:
            held = self.attached_for(asked)
            return span_flops.parked(len(rows.lengths) * rows.longest, held.count if held is not None else 0)
        added = [*self._added(asked).items(), *self._ranks(asked).items()]
        values = sum(self.span.lowest.values(site, rank) for site, rank in added)
        return span_flops.parked(len(rows.lengths) * rows.longest, values)

    def backward_flops(self, rows: Rows, asked: Asked) -> int:
        """Floating-point operations of a backward: of all blocks, or down to the ports of the lowest that has any."""
        shape, whole = (len(rows.lengths), rows.longest), self.span.flops.backward
        if self.valued:
            return self._valued_backward_flops(shape, rows, asked)
        if asked.input_gradient or asked.edge is None:
            return whole.of(*shape) + self.beside_flops(rows, asked)
        return self.span.lowest.down_to(whole, shape, asked.sites, self._added(asked), self._ranks(asked))

    def _ranks(self, asked: Asked) -> dict[Site, int]:
        """Ranks of the cores that the edge has where it takes part."""
        frozen = self.frozen or {}
        return {site: len(frozen[site].down_RI) for site in asked.sites if site in frozen}

    def _valued_backward_flops(self, shape: tuple[int, int], rows: Rows, asked: Asked) -> int:
        """Of the blocks down to the lowest that has values, and of both gradients of each module's adapter."""
        held = self.attached_for(asked)
        sites = list(held.values) if held is not None else []
        whole, adapters = self.span.flops.backward, 2 * self.beside_flops(rows, asked)
        if asked.input_gradient:
            return whole.of(*shape) + adapters
        return self.span.lowest.down_to(whole, shape, sites, {}, {}) + adapters

    def _added(self, asked: Asked) -> dict[Site, int]:
        """Ranks of the adapters that are added without the edge."""
        held = self.parked[1] if asked.parked else {}
        return {site: len(adapter.down_RI) for site, adapter in held.items() if site not in asked.sites}

    def depth(self, asked: Asked) -> float:
        """The share of the span's blocks that a backward goes through: all, or those down to the lowest with a port."""
        ports = [block for block, _ in asked.sites] if asked.edge is not None else None
        return span_flops.depth(self.span.blocks, ports, asked.input_gradient)

    def turns(self, asked: Asked) -> int:
        """How often a pass has the device: once, and again after each block where it waits for the edge."""
        if asked.edge is None:
            return 1
        return 1 + len({block for block, _ in asked.sites if block in self.span.blocks})
