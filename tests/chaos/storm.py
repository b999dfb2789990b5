"""A run in bad weather: a proxy that breaks, slows and swallows, and kills of both processes, drawn from a seed.

Knows how to disturb and what was seen; what is allowed is judged by `history`.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from edge_client.runs import RunDirectory
from isthmus.errors import RunError, UnreachableError
from isthmus.training.checkpoints import load_checkpoint
from tests.chaos.history import Began, Died, Ended, Event, Stepped
from tests.faults.proxy import FAIR, Proxy, Weather, proxied
from tests.faults.training import steps_done
from tests.kills.disturbed import Place, metrics
from tests.kills.forked import KILLED, Forked

STEPS, CHECKPOINT_EVERY = 60, 4
WEATHERS = (
    FAIR,
    Weather(late_s=0.05, jitter_s=0.03),
    Weather(rate=400_000),
    Weather(pieces=2000),
    Weather(stalls_every=30_000, stall_s=0.1),
)


class Storm:
    """One run from its first process to its last; `history` is what was seen."""

    def __init__(self, place: Place, method: str, out: Path, seed: int) -> None:
        self.history: list[Event] = []
        self.done: Counter[str] = Counter()
        self._place, self._method, self._out = place, method, out
        self._random = random.Random(seed)
        self._server = place.serve()
        self._address = self._server.address
        self._edge: Forked | None = None
        self._seen = 0

    def rage(self, seconds: float) -> None:
        """Disturb for so long, then let the run end."""
        with proxied(self._address) as proxy:
            self._begin(proxy)
            until = time.monotonic() + seconds
            while time.monotonic() < until and not self._over():
                self._disturb(proxy)
                self._go_on(proxy)
            proxy.weather = FAIR
            if self._server.ended.is_set():
                self._serve()
            self._finish(proxy)
        self._server.kill()

    def _disturb(self, proxy: Proxy) -> None:
        chosen: tuple[Callable[[Proxy], None], ...] = (
            *[self._change] * 4,
            *[self._cut] * 4,
            *[self._hold] * 2,
            *[self._pause] * 1,
            *[self._kill_edge] * 2,
            *[self._kill_server] * 2,
        )
        act = self._random.choice(chosen)
        self.done[act.__name__.strip("_")] += 1
        act(proxy)
        self._wait(self._random.uniform(0.1, 0.8))

    def _change(self, proxy: Proxy) -> None:
        proxy.weather = self._random.choice(WEATHERS)

    def _cut(self, proxy: Proxy) -> None:
        proxy.resets.extend(self._random.choices((0, 9, 30, 200, 1000, 4000), k=self._random.randint(0, 2)))
        proxy.cut()

    def _hold(self, proxy: Proxy) -> None:
        proxy.change(still=True)
        self._wait(self._random.uniform(0.1, 1.5))
        proxy.change(still=False)

    def _pause(self, _: Proxy) -> None:
        self._server.signal(signal.SIGSTOP)
        self._wait(self._random.uniform(0.1, 1.0))
        self._server.signal(signal.SIGCONT)

    def _kill_server(self, _: Proxy) -> None:
        self._server.kill()
        self._wait(self._random.uniform(0.0, 1.0))
        self._serve()

    def _kill_edge(self, proxy: Proxy) -> None:
        assert self._edge is not None
        self._edge.kill()
        self._go_on(proxy)

    def _go_on(self, proxy: Proxy) -> None:
        """Write down what happened; where the edge was killed, or found no server when it began, start another."""
        assert self._edge is not None
        self._look()
        if self._edge.ended.is_set() and self._edge.code != 0:
            assert self._edge.code in (KILLED, UnreachableError.exit_code), self._edge.said
            self.done["gave up"] += self._edge.code != KILLED
            self.history.append(Died(self._saved()))
            self._begin(proxy)

    def _serve(self) -> None:
        self._server = self._place.serve(listen=self._address)

    def _begin(self, proxy: Proxy) -> None:
        """Start the edge, or go on with what it left."""
        self._seen = self._saved()
        self.history.append(Began(self._seen))
        before = steps_done(self._out)
        if (self._out / "config.yaml").exists():
            self._edge = self._place.resume(self._out)
        else:
            kept = self._out.parent
            config = self._place.settings(
                self._method, proxy.address, kept, steps=STEPS, checkpoint_every=CHECKPOINT_EVERY
            )
            self._edge = self._place.train(config, self._out)
        # What was written after the checkpoint is taken back before anything is added.
        while before > self._seen and steps_done(self._out) == before and not self._edge.ended.is_set():
            time.sleep(0.002)

    def _look(self) -> None:
        """Write down the steps that were committed since the last look."""
        for step in range(self._seen + 1, steps_done(self._out) + 1):
            self.history.append(Stepped(step))
            self._seen = step

    def _saved(self) -> int:
        try:
            found = load_checkpoint(RunDirectory(self._out).checkpoints)
        except RunError:
            return 0
        return found.step if found is not None else 0

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._over():
            self._look()
            time.sleep(0.005)

    def _over(self) -> bool:
        return self._edge is not None and self._edge.ended.is_set() and self._edge.code == 0

    def _finish(self, proxy: Proxy) -> None:
        assert self._edge is not None
        proxy.resets.clear()
        while (code := self._edge.wait()) != 0:
            self._go_on(proxy)
        self._look()
        assert len(metrics(self._out)) == STEPS
        self.history.append(Ended(code))
