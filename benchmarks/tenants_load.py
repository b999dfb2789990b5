"""Tenants that ask one engine in this process, each again as soon as it is answered.

Knows the engine's protocol and clocks; knows no models on disk and no results.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier, Event

import torch

from cloud_node.engine import Engine, Opening, Place
from isthmus.rows import Rows

PROMPT = 32
"""Tokens of a sequence that decoding goes on from."""


@dataclass(frozen=True)
class Served:
    """How it went: tokens a second of all, and each request's seconds."""

    tokens_per_s: float
    latencies_s: Sequence[float]

    def percentile_ms(self, percent: int) -> float:
        """The latency that so many of a hundred requests stay below."""
        return 1000 * statistics.quantiles(self.latencies_s, n=100, method="inclusive")[percent - 1]


class Tenant:
    """One session. It sends rows of tokens, or begins a sequence of each row and adds a token at a time."""

    def __init__(self, engine: Engine, name: str, rows: Rows, decodes: bool, owner: str | None = None) -> None:
        """Open the session; `owner` is whose it is, if not its own."""
        card = engine.describe()
        self._engine, self._name, self._decodes = engine, name, decodes
        self._rows, self._step, self._width = rows, 0, 0
        self._width_D = card.hidden_size
        engine.open(name, Opening(card.cuts[0], tenant=owner or name))

    def ask(self) -> int:
        """Send a request; gives the tokens that were answered."""
        rows = self._next()
        hidden_ND = torch.randn(rows.tokens, self._width_D)
        if self._decodes:
            place = Place("sequence", self._width, self._step)
            self._engine.decode(self._name, self._step + 1, hidden_ND, rows, place)
        else:
            self._engine.forward(self._name, self._step + 1, hidden_ND, rows, False)
        self._width, self._step = self._width + rows.longest, self._step + 1
        return rows.tokens

    def _next(self) -> Rows:
        if not self._decodes:
            return self._rows
        count = len(self._rows.lengths)
        return Rows(((1 if self._width else PROMPT),) * count, (self._width,) * count)

    def leave(self) -> None:
        """Close the session."""
        self._engine.close(self._name)


def serve(tenants: Sequence[Tenant], requests: int) -> Served:
    """All of them at once, so many requests each, after one that is not counted."""
    together = Barrier(len(tenants) + 1)

    def ask(tenant: Tenant) -> tuple[int, list[float]]:
        tenant.ask()
        together.wait()
        return _timed(tenant.ask, requests)

    with ThreadPoolExecutor(len(tenants)) as pool:
        asked = [pool.submit(ask, tenant) for tenant in tenants]
        together.wait()
        began = time.perf_counter()
        done = [each.result() for each in asked]
        spent = time.perf_counter() - began
    for tenant in tenants:
        tenant.leave()
    return Served(sum(tokens for tokens, _ in done) / spent, [one for _, latencies in done for one in latencies])


def serve_beside(greedy: Sequence[Tenant], modest: Sequence[Tenant], requests: int) -> Served:
    """What the modest get while the greedy, who asks from each of its sessions at once, never stops."""
    stop = Event()

    def ask(tenant: Tenant) -> None:
        while not stop.is_set():
            tenant.ask()

    with ThreadPoolExecutor(max(1, len(greedy))) as pool:
        asked = [pool.submit(ask, tenant) for tenant in greedy]
        try:
            served = serve(modest, requests)
        finally:
            stop.set()
        for each in asked:
            each.result()
    for tenant in greedy:
        tenant.leave()
    return served


def _timed(ask: Callable[[], int], requests: int) -> tuple[int, list[float]]:
    tokens, latencies = 0, []
    for _ in range(requests):
        began = time.perf_counter()
        tokens += ask()
        latencies.append(time.perf_counter() - began)
    return tokens, latencies
