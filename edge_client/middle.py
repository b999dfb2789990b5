"""What stands in the middle of an edge model, whose span runs elsewhere, and which ports it opens there.

Knows modules, settings and ports; opens no session and loads nothing.
"""

from collections.abc import Mapping

from transformers import PreTrainedModel

from edge_client.cached import CachedSpan, Outputs, Spared
from edge_client.config import TrainConfig
from edge_client.edge_model import answers_where_wanted
from edge_client.passes import RemoteBackbone
from edge_client.port_adapters import PortAdapters
from edge_client.remote import RemoteSpan
from edge_client.side import check_shape
from edge_client.span_values import SpanValues
from edge_client.targets import span_targets
from isthmus.blocks import BlockList, watch_owner
from isthmus.cut import Cut
from isthmus.ledger.record import Ledger
from isthmus.linears import Linear, Site
from isthmus.ports import CORE, LORA, LORA_VALUES, Port, every


def ports_of(config: TrainConfig, cut: Cut, model: PreTrainedModel, found: BlockList) -> tuple[Port, ...]:
    """The ports of a run in its span: where adapters answer, or taps for a side network; `found` has what was grafted.

    Raises:
        UsageError: there are no such modules, or the side network does not fit.
    """
    if config.in_span:
        sites = span_targets(model, found, cut, config.targets)
        cores = config.placement.cores
        if cores is None:
            kind = LORA_VALUES if config.exchange == "parameters" else LORA
            return tuple(Port(block, module=module, kind=kind) for block, module in sites)
        seed = cores.seed if cores.init == "random" else 0
        return tuple(
            Port(block, module=module, kind=CORE, rank=cores.rank, init=cores.init, seed=seed)
            for block, module in sites
        )
    side = config.placement.side
    if side is None:
        return ()
    check_shape(side, model.config.get_text_config().hidden_size)
    return every(side.every, cut, len(found.blocks), side.width)


def span_adapters(
    config: TrainConfig,
    found: BlockList,
    ports: tuple[Port, ...],
    linears: Mapping[Site, Linear],
    ledger: Ledger,
    remote: RemoteBackbone,
) -> PortAdapters | None:
    """Adapters of modules in the span: they answer at their ports, or their values cross once a step."""
    if not config.in_span:
        return None
    if config.exchange == "parameters":
        return SpanValues(found, ports, linears, ledger, remote)
    return PortAdapters(found, ports, linears, ledger)


def put_in_the_middle(
    found: BlockList,
    cut: Cut,
    remote: RemoteBackbone,
    outputs: Outputs | None,
    ports: tuple[Port, ...],
    adapters: PortAdapters | None,
) -> None:
    """Put the span into the model: what asks for each pass or, with `outputs`, what reads them from the cache."""
    topmost = answers_where_wanted(cut, found)
    watch_owner(found.owner)
    span = RemoteSpan(cut.bottom, found, remote, topmost, adapters)
    if adapters is not None:
        for name, grafted in found.blocks[cut.bottom].named_children():
            span.add_module(name, grafted)
    if outputs is None:
        found.blocks[cut.bottom] = span
        return
    for number in range(cut.bottom):
        found.blocks[number] = Spared(found.blocks[number], found)
    cached = CachedSpan(span, found, outputs, ports)
    cached.watch(found.owner, topmost)
    found.blocks[cut.bottom] = cached
