"""What a pass through the span asks at its ports, from which modules share their input.

Knows linear modules by place and which ports take part; knows no sizes of batches, no messages and no adapters. Only
what the lowest block asks in its backward cannot be told so: that block is run on the meta device, its modules asking,
as they do on a cloud node, somebody who answers with nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import DynamicCache, PreTrainedModel

from isthmus.blocks import BlockList, capture_at, inject_at, injecting, narrowed, run_blocks
from isthmus.cores import Frozen, outline
from isthmus.linears import Linear, Site
from isthmus.round_trips import Question, RoundTrips, ask_at, asking


@dataclass(frozen=True)
class PortQuestion:
    """What is asked at ports of one block that share their input.

    Attributes:
        block: of the ports.
        modules: the ports.
        backward: the pass that asks.
        wanted: forward: a backward follows; backward: the gradient of the input is due.
        sent: values a token of the tensors that leave for the edge.
        due: those of the edge's answer.
    """

    block: int
    modules: tuple[str, ...]
    backward: bool
    wanted: bool
    sent: tuple[int, ...]
    due: tuple[int, ...]


class Questions:
    """The questions of a span's passes, whichever of its ports take part."""

    def __init__(
        self,
        model: PreTrainedModel,
        found: BlockList,
        linears: Mapping[Site, Linear],
        ranks: Mapping[Site, int] | None = None,
    ) -> None:
        """Ask of a span on the meta device, which stays as it is; `ranks` are those of the edge's cores, if any."""
        self._model, self._found, self._linears = model, found, dict(linears)
        self._ranks = dict(ranks or {})
        self._unwanted = lru_cache(maxsize=None)(self._runs_without)

    def of(self, sites: frozenset[Site], below: bool) -> Iterator[PortQuestion]:
        """What both passes of one request ask.

        Args:
            sites: the ports that take part.
            below: the gradient of the span's input is wanted.
        """
        lowest = min((block for block, _ in sites), default=0)
        unwanted = frozenset() if below else self._unwanted(frozenset(site for site in sites if site[0] == lowest))
        for block, shared in sorted({(block, self._linears[block, name].shared) for block, name in sites}):
            modules = tuple(name for name in shared if (block, name) in sites)
            own: tuple[int, ...] = (self._linears[block, modules[0]].inputs,)
            added = tuple(self._linears[block, name].outputs for name in modules)
            if self._ranks:
                own = added = tuple(self._ranks[block, name] for name in modules)
            wanted = (block, modules) not in unwanted
            yield PortQuestion(block, modules, False, True, own, added)
            yield PortQuestion(block, modules, True, wanted, added, own if wanted else ())

    def _runs_without(self, sites: frozenset[Site]) -> frozenset[tuple[int, tuple[str, ...]]]:
        """The ports of one block whose input needs no gradient where nothing below the block does."""
        if not sites:
            return frozenset()
        block, edge = next(iter(sites))[0], _Recorder()
        model, found = narrowed(self._model, self._found, [block])
        for hook in (inject_at, capture_at):
            hook(found.blocks[block])
        ask_at(found, [block])
        around = {site: Frozen(*outline(self._linears[site], self._ranks[site])) for site in sites & self._ranks.keys()}
        frozen = {site: each.at(torch.device("meta"), model.dtype) for site, each in around.items()} or None
        trips = RoundTrips(sites, {}, self._linears, edge, None, True, frozen)
        size = model.config.get_text_config().hidden_size
        hidden_BTD = torch.empty(1, 2, size, dtype=model.dtype, device="meta")
        with torch.device("meta"), asking(trips), injecting(hidden_BTD) as captured:
            run_blocks(model.base_model, found.blocks, hidden_BTD, cache=DynamicCache())
            torch.autograd.backward(captured[0], torch.ones_like(captured[0]))
        return frozenset((one.block, tuple(one.modules)) for one in edge.asked if one.backward and not one.wanted)


class _Recorder:
    """Notes each question and answers with tensors of the sizes that are due."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def ask(self, question: Question) -> list[torch.Tensor]:
        """See `isthmus.round_trips.Edge`."""
        self.asked.append(question)
        like = question.tensors[0]
        return [like.new_empty(len(like), width) for width in question.widths]
