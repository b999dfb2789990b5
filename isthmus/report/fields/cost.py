"""What training cost: bytes on the wire, the work of either side, and whether both counted the same bytes.

Knows the figures; counts nothing. A figure that does not exist is null.
"""

from typing import Self

from pydantic import model_validator

from isthmus.report.fields.block import Amount, Block, Count


class Traffic(Block):
    """Bytes as serialised, gRPC's 5-byte prefix included."""

    up_bytes: Count
    down_bytes: Count


class ByPhase(Block):
    """Traffic of each phase; `submit` is of handing the adapter in, once the run is done."""

    fetch: Traffic
    train: Traffic
    eval: Traffic
    generate: Traffic
    control: Traffic
    submit: Traffic = Traffic(up_bytes=0, down_bytes=0)


class CacheUse(Block):
    """Rows whose span output came from the edge's cache, and rows that were fetched into it."""

    cached_rows: Count
    fetched_rows: Count


class Cache(Block):
    """What the edge's cache of span outputs saved, by phase."""

    train: CacheUse
    eval: CacheUse


class Wire(Block):
    """Traffic of the training steps only, but for `by_phase`; overhead: what was neither tensor nor bundle file.

    `cache` is null where the run had none.
    """

    up_bytes: Count
    down_bytes: Count
    overhead_bytes: Count
    round_trips: Count
    by_phase: ByPhase
    resent_bytes: Count | None = None
    cache: Cache | None = None


class Side(Block):
    """What the training steps took of one side: FLOPs, seconds, peak bytes."""

    forward_flops: Count | None
    backward_flops: Count | None
    forward_s: Amount | None
    backward_s: Amount | None
    peak_tensor_bytes: Count | None
    peak_memory_bytes: Count | None


class Edge(Side):
    """The data owner's side; `wait_s`: waiting for the cloud."""

    wait_s: Amount | None


class Cloud(Side):
    """The model owner's side; `queue_s`: requests waiting their turn; recomputation is part of the forwards."""

    queue_s: Amount | None
    recompute_flops: Count | None = None
    recomputed_calls: Count | None = None


class Cost(Block):
    """What training cost, on the wire and on either side."""

    wire: Wire
    edge: Edge
    cloud: Cloud


class SideCount(Block):
    """One side's own count of the checked streams."""

    sent_bytes: Count
    received_bytes: Count


class Agreement(Block):
    """Both sides' counts of the same streams; streams that broke before they could be compared are unchecked."""

    edge: SideCount
    cloud: SideCount
    equal: bool
    unchecked_streams: Count

    @model_validator(mode="after")
    def _truthful(self) -> Self:
        crossed = (self.cloud.received_bytes, self.cloud.sent_bytes)
        if self.equal != ((self.edge.sent_bytes, self.edge.received_bytes) == crossed):
            raise ValueError("`equal` contradicts the counts")
        return self
