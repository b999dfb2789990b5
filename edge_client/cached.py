"""The span where nothing below its end trains: its output for a row is computed once, then read from the cache.

Knows rows, the blocks below the span, the cache and the remote span; knows no optimizer. A row is asked for when a
call of the model first needs it; deterministic runs ask for each row by itself, so that its bits depend on it alone.
"""

import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from edge_client.cache import row_key
from edge_client.passes import VALUE_BYTES, RemoteBackbone
from edge_client.remote import RemoteSpan
from isthmus.blocks import BlockList, call_context, during_calls, narrowed, run_blocks, stand_for
from isthmus.cut import Cut
from isthmus.ledger.flops import PassFlops, count, on_meta
from isthmus.ledger.record import Ledger
from isthmus.ports import Port, tapped
from isthmus.rows import Rows, pack, pad, rows_of_batch
from isthmus.training.outputs import wanted_positions
from isthmus.wire.tensors import Encoded

STEM_SEES = frozenset({"input_ids", "attention_mask", "position_ids"})
SEEN_BY_NONE = frozenset({"return_dict"})
"""Arguments of a call that may be answered from the cache; with any other that is set, the span runs."""

LONGEST_ANSWER = 4096
"""Rows that one request asks for apart."""


@dataclass(frozen=True)
class Row:
    """A row's real tokens and what decides its outputs beside them.

    Attributes:
        ids: token ids.
        start: the first one's position, if the call gave positions; else its column, after padding on the left.
        wanted: which outputs come back; None: all.
        placed: the call gave positions. Else the model's family derives them, from columns or from the mask.
    """

    ids: tuple[int, ...]
    start: int = 0
    wanted: tuple[bool, ...] | None = None
    placed: bool = False

    @cached_property
    def key(self) -> str:
        """Its content's hash."""
        return row_key(self.ids, self.start, self.wanted, self.placed)


Output = list[torch.Tensor]
"""What the cloud answers for one row: the span's output [wanted, D] and, with taps, those side by side [tokens, W]."""


class Below:
    """What the edge runs below the span, apart from the model that trains; it shares the model's weights."""

    def __init__(self, model: PreTrainedModel, found: BlockList, cut: Cut) -> None:
        """Take the stem and the blocks below `cut`'s span."""
        twin, own = narrowed(model, found, range(cut.bottom))
        self._owner = own.owner
        self._weight = twin.get_input_embeddings().weight
        self._caught = threading.local()
        own.blocks[cut.bottom].register_forward_pre_hook(self._catch)
        self.flops = self._count() if cut.bottom else PassFlops(0, 0)

    def __deepcopy__(self, _: dict[int, Any]) -> "Below":
        """A copied model's hooks catch for the same."""
        return self

    @torch.no_grad()
    def hidden(self, rows: Sequence[Row]) -> tuple[torch.Tensor, Rows]:
        """The span's input for these rows, packed: [N, D]."""
        shape = _shape(rows)
        # Families derive positions from columns or from the mask: what was padded on the left is so again.
        columns = [0 if row.placed else row.start for row in rows]
        width = max(column + len(row.ids) for column, row in zip(columns, rows, strict=True))
        ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
        mask_BT, positions_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
        for number, (column, row) in enumerate(zip(columns, rows, strict=True)):
            place = slice(column, column + len(row.ids))
            ids_BT[number, place], mask_BT[number, place] = torch.tensor(row.ids), 1
            positions_BT[number, place] = torch.arange(row.start, row.start + len(row.ids))
        padded, device = not bool(mask_BT.all()), self._weight.device
        arguments = {"position_ids": positions_BT.to(device)} if rows[0].placed else {}
        mask = mask_BT.to(device) if padded else None
        self._owner(input_ids=ids_BT.to(device), attention_mask=mask, use_cache=False, **arguments)
        index_N = mask_BT.reshape(-1).nonzero()[:, 0] if padded else None
        return pack(self._caught.hidden_BTD, index_N), shape

    def _catch(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._caught.hidden_BTD = args[0]

    def _count(self) -> PassFlops:
        owner, weight = on_meta(self._owner), self._weight

        def run(tokens: int, _: int) -> torch.Tensor:
            embeds_BTD = torch.empty(1, tokens, weight.shape[1], dtype=weight.dtype, device="meta")
            return run_blocks(owner, nn.ModuleList(), embeds_BTD, cache=DynamicCache())

        return count(run).forward


def _shape(rows: Sequence[Row]) -> Rows:
    flags = [flag for row in rows for flag in (row.wanted or (True,) * len(row.ids))]
    wanted_N = torch.tensor(flags) if rows[0].wanted is not None else None
    return Rows(tuple(len(row.ids) for row in rows), tuple(row.start for row in rows), wanted_N)


class Keeps(Protocol):
    """Where rows' outputs are kept by key, such as `edge_client.cache.OutputCache`."""

    def get(self, key: str, /) -> list[torch.Tensor] | None:
        """A row's tensors, if they are there."""

    def put(self, key: str, tensors: Sequence[Encoded], /) -> None:
        """Keep a row's tensors."""


class Outputs:
    """The span's outputs by row: from the cache, else over the wire and into the cache. Any thread may ask."""

    def __init__(
        self,
        below: Below,
        remote: RemoteBackbone,
        cache: Keeps,
        ledger: Ledger,
        widths: tuple[int, ...],
        answer_bytes: int,
        alone: bool,
    ) -> None:
        """`widths`: of a row's tensors; `answer_bytes`: the most of one answer; `alone` asks for each row by itself."""
        self._below = below
        self._remote = remote
        self._cache = cache
        self._ledger = ledger
        self._widths = widths
        self._answer_bytes = answer_bytes
        self._alone = alone

    def __deepcopy__(self, _: dict[int, Any]) -> "Outputs":
        """A copied model reads the same outputs."""
        return self

    def __contains__(self, row: Row) -> bool:
        """Whether it is in the cache, whole; it counts as used now."""
        return self._cache.get(row.key) is not None

    @property
    def flops_below(self) -> PassFlops:
        """Of a forward through what is below the span."""
        return self._below.flops

    def of(self, rows: Sequence[Row]) -> list[Output]:
        """Each row's output; equal rows are asked for once."""
        found: dict[str, Output] = {}
        missing: list[Row] = []
        for key, row in {row.key: row for row in rows}.items():
            output = self._cache.get(key)
            if output is None:
                missing.append(row)
            else:
                found[key] = output
        if missing:
            for row, output in zip(missing, self._fetch(self._requests(missing)), strict=True):
                found[row.key] = output
        cached = len(rows) - len(missing)
        self._ledger.add(self._remote.phase, cached_rows=cached, fetched_rows=len(missing))
        return [found[row.key] for row in rows]

    def _requests(self, rows: list[Row]) -> list[list[Row]]:
        lengths = [len(row.ids) for row in rows]
        asked = requests_of(lengths, sum(self._widths), self._answer_bytes, self._alone)
        return [[rows[number] for number in numbers] for numbers in asked]

    def _fetch(self, batches: list[list[Row]]) -> Iterator[Output]:
        asked = []
        for batch in batches:
            hidden_ND, rows = self._below.hidden(batch)
            flops = self._below.flops.of(len(batch), rows.longest)
            self._ledger.add(self._remote.phase, edge_forward_flops=flops)
            asked.append((batch, rows, self._remote.ask_apart(hidden_ND, rows, self._widths)))
        for batch, rows, future in asked:
            for row, parts in zip(batch, self._remote.take_apart(future, rows, self._widths), strict=True):
                if self._remote.phase != "generate":  # a growing text would leave an entry for each of its lengths
                    self._cache.put(row.key, [part.encoded for part in parts])
                yield [part.tensor for part in parts]


def requests_of(lengths: Sequence[int], width: int, answer_bytes: int, alone: bool) -> list[list[int]]:
    """Which rows are asked for together: no answer, padded and as float32, is larger than the server takes.

    Args:
        lengths: tokens of each row.
        width: values a token of an answer.
        answer_bytes: the most of one answer.
        alone: each row by itself.
    """
    requests: list[list[int]] = []
    most = 1 if alone else LONGEST_ANSWER
    longest = 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        last = requests[-1] if requests else []
        size = VALUE_BYTES * width * longest * (len(last) + 1)
        if not requests or len(last) >= most or size > answer_bytes:
            requests.append([number])
            longest = length
        else:
            last.append(number)
    return requests


@dataclass(frozen=True)
class _Known:
    """The answer to the call under way, padded."""

    output_BTD: torch.Tensor
    taps: dict[int, torch.Tensor]


_known: ContextVar[_Known | None] = ContextVar("known_output", default=None)


class Spared(nn.Module):
    """A block below the span, which need not run where the span's output is known."""

    def __init__(self, block: nn.Module, found: BlockList) -> None:
        super().__init__()
        self.block = block
        self._found = found
        stand_for(self, block)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block returns, or its input."""
        if _known.get() is not None:
            return self._found.result(hidden_states)
        return self.block(hidden_states, *args, **kwargs)


class CachedSpan(nn.Module):
    """Stands at the span's first block; calls with a key-value cache, as in generation, go to the remote span."""

    def __init__(self, remote: RemoteSpan, found: BlockList, outputs: Outputs, ports: tuple[Port, ...]) -> None:
        super().__init__()
        self.remote = remote
        self.outputs = outputs
        self.ports = ports
        self._found = found

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the span's blocks would return."""
        known = _known.get()
        if known is None:
            return self.remote(hidden_states, *args, **kwargs)
        tapped().update(known.taps)
        return self._found.result(known.output_BTD)

    def watch(self, owner: nn.Module, topmost: bool) -> None:
        """Answer calls of the blocks' `owner` that use no key-value cache before its blocks run.

        Goes after `isthmus.blocks.watch_owner`; `topmost` says that no block is above the span.
        """

        def answer(given: dict[str, Any]) -> _Known | None:
            said = {name for name, value in given.items() if value is not None and value is not False}
            answerable = "input_ids" in said and said <= STEM_SEES | SEEN_BY_NONE and given.get("use_cache") is False
            return self._look_up(given["input_ids"], next(owner.parameters()), topmost) if answerable else None

        during_calls(owner, _known, answer)

    def _look_up(self, ids_BT: torch.Tensor, like: torch.Tensor, topmost: bool) -> _Known:
        context, shape = call_context(), (ids_BT.shape[0], ids_BT.shape[1])
        wanted_BT = wanted_positions() if topmost else None
        rows, index_N = rows_of_batch(shape, context.attention_mask_BT, context.position_ids_BT, wanted_BT=wanted_BT)
        index_N = torch.arange(rows.tokens) if index_N is None else index_N
        placed = context.position_ids_BT is not None
        outputs = self.outputs.of(_rows(ids_BT.reshape(-1).cpu()[index_N], rows, placed))
        wanted = index_N if rows.wanted_N is None else index_N[rows.wanted_N]
        output_ND = torch.cat([output[0] for output in outputs]).to(like.device, like.dtype)
        taps = {}
        if self.ports:
            taps_NW = torch.cat([output[1] for output in outputs]).to(like.device, like.dtype)
            parts = torch.split(taps_NW, [port.width for port in self.ports], -1)
            taps = {port.block: pad(part, index_N, shape) for port, part in zip(self.ports, parts, strict=True)}
        return _Known(pad(output_ND, wanted, shape), taps)


def _rows(ids_N: torch.Tensor, rows: Rows, placed: bool) -> list[Row]:
    lengths = list(rows.lengths)
    ids = torch.split(ids_N, lengths)
    flags = torch.split(rows.wanted_N, lengths) if rows.wanted_N is not None else [None] * len(lengths)
    return [
        Row(tuple(part.tolist()), start, None if wanted is None else tuple(wanted.tolist()), placed)
        for part, start, wanted in zip(ids, rows.starts, flags, strict=True)
    ]
