"""Requests that are computed together: their rows one under another, run once, and the answers split again.

Knows spans, rows and decode caches; knows no sessions, no tenants and no queue. The weights are frozen and the same for
all, so joining is concatenation; padding is bounded by joining only what is about equally long.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cloud_node.engine import Work
from cloud_node.span import DecodeState, Span
from isthmus.rows import Rows

ROWS = 64
"""Rows computed together, unless told otherwise."""

POSITIONS = 2048
"""Positions computed together, padding included: more would not use a device better, and would keep others waiting."""

CACHED_POSITIONS = 1 << 17
"""Cached positions attended to together, padding included."""

LONGER = 1.25
"""How much longer rows may be than those that they are padded with."""

WIDER = 2.0
"""The same of cached pasts: reading weights costs much more than reading them."""


@dataclass(eq=False)
class Request:
    """A forward that keeps nothing, or a decode, which extends `state`; once it has run, `output_KD` is there."""

    span: Span
    hidden_ND: torch.Tensor
    rows: Rows
    state: DecodeState | None = None
    work: Work = field(default_factory=Work)
    output_KD: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    since: float = field(default_factory=time.perf_counter)

    @property
    def positions(self) -> int:
        """Padding included."""
        return len(self.rows.lengths) * self.rows.longest

    @property
    def width(self) -> int:
        """What each row is padded to: its cached past, or its tokens where there is none."""
        return self.past or self.rows.longest

    @property
    def past(self) -> int:
        """Cached tokens of each row."""
        return self.state.width if self.state is not None else 0

    @property
    def kind(self) -> tuple[object, ...]:
        """What requests must have in common. Tokens that follow a past are as many: no padding may stand between."""
        return self.span, self.state is not None, self.rows.longest if self.past else 0

    def run(self) -> None:
        """Run it by itself."""
        began = time.perf_counter()
        with torch.no_grad():
            if self.state is not None:
                self.output_KD, _ = self.span.decode(self.hidden_ND, self.rows, self.state)
            else:
                self.output_KD = self.span.forward(self.hidden_ND, self.rows)
            self.span.settle()
        self.note(began, time.perf_counter() - began)

    def note(self, began: float, spent: float) -> None:
        """Note when it began to run, and its share of the seconds."""
        self.work.queue_s, self.work.forward_s = began - self.since, spent


class Batch:
    """Requests that run together."""

    def __init__(self, first: Request, most_rows: int) -> None:
        """Begin with one, to join at most so many rows."""
        self._most_rows = most_rows
        self._requests = [first]
        self._rows = len(first.rows.lengths)
        self._longest, self._narrowest, self._widest = first.rows.longest, first.width, first.width

    def take(self, other: Request) -> bool:
        """Take in another request if it fits."""
        first = self._requests[0]
        rows, longest = self._rows + len(other.rows.lengths), max(self._longest, other.rows.longest)
        narrowest, widest = min(self._narrowest, other.width), max(self._widest, other.width)
        past = bool(first.past)
        if (
            other.kind != first.kind
            or rows > self._most_rows
            or rows * longest > POSITIONS
            or widest > narrowest * (WIDER if past else LONGER)
            or (past and rows * widest > CACHED_POSITIONS)
            or not (_is_plain(first.state) and _is_plain(other.state))
        ):
            return False
        self._requests.append(other)
        self._rows, self._longest, self._narrowest, self._widest = rows, longest, narrowest, widest
        return True

    def run(self) -> None:
        """Run them together, each sharing the seconds by its positions; a failure changes none of them."""
        began = time.perf_counter()
        decoding = [(request.state, request.rows) for request in self._requests if request.state is not None]
        try:
            with torch.no_grad():
                outputs_KD = self._split(self._decode(decoding) if decoding else self._forward())
                self._requests[0].span.settle()
        except BaseException:
            for state, _ in decoding:
                _crop(state.cache, state.width)
            raise
        for state, rows in decoding:
            state.see(rows)
        spent, positions = time.perf_counter() - began, sum(request.positions for request in self._requests)
        for request, output_KD in zip(self._requests, outputs_KD, strict=True):
            request.output_KD = output_KD
            request.note(began, spent * request.positions / positions)

    def _forward(self) -> torch.Tensor:
        return self._requests[0].span.forward(self._hidden(), self._all_rows())

    def _decode(self, parts: Sequence[tuple[DecodeState, Rows]]) -> torch.Tensor:
        """Extends the caches; the states do not see it yet."""
        width = max(state.width for state, _ in parts)
        before_BT = torch.cat([pad(state.mask_BT, (width - state.width, 0)) for state, _ in parts])
        cache = _JoinedCache([(state.cache, rows) for state, rows in parts], width)
        state = DecodeState(cache, before_BT, [])
        return self._requests[0].span.decode(self._hidden(), self._all_rows(), state)[0]

    def _hidden(self) -> torch.Tensor:
        span = self._requests[0].span
        return torch.cat([request.hidden_ND.to(span.device, span.dtype) for request in self._requests])

    def _all_rows(self) -> Rows:
        rows = [request.rows for request in self._requests]
        lengths = tuple(length for one in rows for length in one.lengths)
        starts = tuple(start for one in rows for start in one.starts)
        if all(one.wanted_N is None for one in rows):
            return Rows(lengths, starts)
        wanted = [torch.ones(one.tokens).bool() if one.wanted_N is None else one.wanted_N for one in rows]
        return Rows(lengths, starts, torch.cat(wanted))

    def _split(self, output_KD: torch.Tensor) -> list[torch.Tensor]:
        """Each request's own, in memory of its own: a client that is slow to read must not hold the others'."""
        counts = [request.rows.returned for request in self._requests]
        return [part.clone() for part in torch.split(output_KD, counts)]


class _JoinedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of several caches, padded on the left to one width while the layer runs; each keeps its own memory."""

    def __init__(self, pasts: Sequence[DynamicLayer], rows: Sequence[Rows], width: int) -> None:
        super().__init__()
        ends = list(accumulate(len(one.lengths) for one in rows))
        self._parts = [
            (past, slice(end - len(one.lengths), end), one.longest)
            for past, one, end in zip(pasts, rows, ends, strict=True)
        ]
        self._before = width
        self._width = width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add to each cache its own rows' keys and values; all of them, [rows, heads, width, size]."""
        for past, rows, tokens in self._parts:
            past.update(key_states[rows, :, -tokens:], value_states[rows, :, -tokens:])
        self._width += key_states.shape[-2]
        if not self._before:
            return key_states, value_states
        return self._joined("keys", key_states), self._joined("values", value_states)

    def get_seq_length(self) -> int:
        """The width that all are padded to."""
        return self._width

    def _joined(self, name: str, like: torch.Tensor) -> torch.Tensor:
        joined = like.new_zeros(*like.shape[:-2], self._width, like.shape[-1])
        for past, rows, _ in self._parts:
            held: torch.Tensor = getattr(past, name)
            joined[rows, :, self._width - held.shape[-2] :] = held
        return joined


class _JoinedCache(DynamicCache):  # type: ignore[misc]
    """Caches of several requests as one, for one call of the model."""

    def __init__(self, parts: Sequence[tuple[DynamicCache, Rows]], width: int) -> None:
        super().__init__()
        self._caches = [cache for cache, _ in parts]
        self._rows = [rows for _, rows in parts]
        self._before = width
        self._reach(max(len(cache.layers) for cache in self._caches))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of any cache."""
        self._reach(layer_idx + 1)
        layer: _JoinedLayer = self.layers[layer_idx]
        return layer.update(key_states, value_states)

    def _reach(self, count: int) -> None:
        for cache in self._caches:
            cache.layers += [DynamicLayer() for _ in range(len(cache.layers), count)]
        for number in range(len(self.layers), count):
            pasts = [cache.layers[number] for cache in self._caches]
            self.layers.append(_JoinedLayer(pasts, self._rows, self._before))


def _crop(cache: DynamicCache, width: int) -> None:
    """Take back what a run that failed half way has added, be it keys whose values are missing."""
    if not width:
        cache.layers.clear()
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., :width, :], layer.values[..., :width, :]


def _is_plain(state: DecodeState | None) -> bool:
    """Whether every layer holds all keys and values, one for each position."""
    return state is None or all(type(layer) is DynamicLayer for layer in state.cache.layers)
