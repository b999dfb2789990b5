"""Whether a node can do its work: one real token through its span, now and then.

Knows the engine and the clock; knows no wire. A token is run when somebody asks, at most one in `EVERY_S` seconds and
one at a time, so whoever asks often learns what is known and makes nobody compute. A token that takes long is no sign
of illness while requests are being answered: it waits its turn like any other.
"""

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Final

import torch

from cloud_node.engine import Engine, Opening
from isthmus.rows import Rows

log = logging.getLogger(__name__)

EVERY_S: Final = 10.0
"""Between tokens at least."""

LATE_S: Final = 20.0
"""Nothing has been answered for so long, the token neither: the node is not serving."""

WEDGED_S: Final = 600.0
"""The same for so long, and only a new process will help."""

NAME: Final = "health check"
"""Of its session and its tenant; with a space, as no client's session can be called."""

FAILED: Final = "a token did not come through the span; the log says why"
NOT_FINITE: Final = "a token came out of the span as no number"


class Health:
    """Runs tokens through an engine and says what came of them; any thread may ask."""

    def __init__(
        self, engine: Engine, answered: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Ask `engine`; `answered` tells how many requests it has answered, for whomever."""
        self._engine = engine
        self._answered, self._clock = answered, clock
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._asked: Future[str | None] | None = None
        self._since = -math.inf  # when the latest token was asked for
        self._seen = answered()
        self._well = -math.inf  # when the engine was last seen to answer

    def missing(self, within_s: float) -> str | None:
        """Why the node is not serving, after waiting `within_s` seconds at most; None: it is."""
        with self._lock:
            asked = self._token_asked()
        wait((asked,), within_s)
        with self._lock:
            self._look()
            if asked.done():
                return asked.result()
            now = self._clock()
            if now - self._well < LATE_S:
                return None
            return f"a token has been on its way through the span for {now - self._since:.0f} s"

    @property
    def wedged(self) -> bool:
        """Whether nothing comes out of the engine any more."""
        with self._lock:
            self._look()
            if self._asked is None or self._asked.done():
                return False
            return self._clock() - max(self._well, self._since) >= WEDGED_S

    def _look(self) -> None:
        """See whether requests were answered since the last look; with the lock."""
        answered = self._answered()
        if answered != self._seen:
            self._seen, self._well = answered, self._clock()

    def _token_asked(self) -> "Future[str | None]":
        """The token that is under way or was not long ago, or a new one; with the lock."""
        if self._asked is None or (self._asked.done() and self._clock() - self._since >= EVERY_S):
            self._asked, self._since = Future(), self._clock()
            # A daemon: a node whose engine hangs can still be stopped.
            threading.Thread(target=self._run, args=(self._asked,), name="health", daemon=True).start()
        return self._asked

    def _run(self, asked: "Future[str | None]") -> None:
        try:
            found = None if self._token() else NOT_FINITE
        except Exception as error:  # noqa: BLE001 (whatever an engine raises, the node is not well)
            log.warning(
                "a token did not come through the span: %s", " ".join(str(error).split()) or type(error).__name__
            )
            found = FAILED
        if found is None:
            self._well = self._clock()
        asked.set_result(found)

    def _token(self) -> bool:
        """Run a token through the widest span that is offered, joined with nobody's; whether numbers came out."""
        card = self._engine.describe()
        cut = min(card.cuts, key=lambda cut: cut.bottom + cut.top)
        self._engine.open(NAME, Opening(cut, tenant=NAME, alone=True))
        try:
            token_ND, rows = torch.ones(1, card.hidden_size), Rows((1,), (0,))
            answer = self._engine.forward(NAME, next(self._numbers), token_ND, rows, keep=False)
        finally:
            self._engine.close(NAME)
        return bool(torch.isfinite(answer.tensor_KD).all())
