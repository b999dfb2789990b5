"""What a ledger's totals come to, as the report's blocks of costs.

Knows the ledger's figures and the report's fields; measures nothing and formats nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.ledger.record import Ledger, Phase
from isthmus.report.fields.cost import ByPhase, Cache, CacheUse, Cloud, Cost, Edge, Traffic, Wire
from isthmus.report.fields.ports import BlockCost, PortCost


def from_ledger(ledger: Ledger) -> Cost:
    """The cost block: both sides' work and the wire's totals of the training steps, and every phase's bytes."""
    train: dict[str, Any] = ledger.totals("train")
    peaks = ledger.peaks()

    def side(name: str, *figures: str) -> dict[str, Any]:
        spent = {figure: train.get(f"{name}_{figure}") for figure in figures}
        return spent | {kind: peaks.get(f"{name}_{kind}") for kind in ("peak_tensor_bytes", "peak_memory_bytes")}

    passes = ("forward_flops", "backward_flops", "forward_s", "backward_s")
    cloud = side("cloud", *passes, "queue_s", "recompute_flops")
    return Cost(
        wire=_wire(ledger, train),
        edge=Edge(**side("edge", *passes, "wait_s")),
        cloud=Cloud(**cloud, recomputed_calls=train.get("recomputed_calls")),
    )


def port_costs(
    ledger: Ledger, names: Sequence[str], trained: Mapping[str, int], probed: Mapping[str, int]
) -> tuple[tuple[PortCost, ...], tuple[BlockCost, ...]]:
    """What ports cost in training, in the order of `names`, and what their blocks did, lowest first.

    Args:
        ledger: holds bytes and round trips at the blocks, and FLOPs at the ports.
        names: every port, whether it trained or not.
        trained: steps in which a port trained, by its name; none where it is missing.
        probed: steps in which it was only probed, likewise.
    """
    places: dict[str, dict[str, Any]] = ledger.places("train")

    def at(place: str, *figures: str) -> dict[str, Any]:
        return {figure: places.get(place, {}).get(figure, 0) for figure in figures}

    ports = tuple(
        PortCost(
            name=name,
            trained_steps=trained.get(name, 0),
            probed_steps=probed.get(name, 0),
            **at(name, "edge_forward_flops", "edge_backward_flops"),
        )
        for name in names
    )
    numbers = sorted({port.block for port in ports})
    crossed = ("up_bytes", "down_bytes", "round_trips")
    return ports, tuple(BlockCost(block=number, **at(str(number), *crossed)) for number in numbers)


def traffic_of(ledger: Ledger, *phases: Phase) -> Traffic:
    """What crossed in these phases."""
    up, down = (int(sum(ledger.total(phase, figure) for phase in phases)) for figure in ("up_bytes", "down_bytes"))
    return Traffic(up_bytes=up, down_bytes=down)


def _wire(ledger: Ledger, train: dict[str, Any]) -> Wire:
    phases = ByPhase(
        fetch=traffic_of(ledger, "fetch"),
        train=traffic_of(ledger, "train"),
        eval=traffic_of(ledger, "eval", "look"),
        generate=traffic_of(ledger, "generate"),
        control=traffic_of(ledger, "control"),
        submit=traffic_of(ledger, "submit"),
    )
    return Wire(
        up_bytes=phases.train.up_bytes,
        down_bytes=phases.train.down_bytes,
        overhead_bytes=ledger.overhead_bytes("train"),
        round_trips=train.get("round_trips", 0),
        by_phase=phases,
        resent_bytes=train.get("resent_bytes", 0),
        cache=_cache(ledger),
    )


def _cache(ledger: Ledger) -> Cache | None:
    figures = ("cached_rows", "fetched_rows")
    train: dict[str, Any] = ledger.totals("train")
    scored: dict[str, Any] = ledger.totals("eval")
    if not {*train, *scored}.intersection(figures):
        return None
    uses = [CacheUse(**{figure: spent.get(figure, 0) for figure in figures}) for spent in (train, scored)]
    return Cache(train=uses[0], eval=uses[1])
