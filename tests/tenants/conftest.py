"""An engine whose device a test holds, so that it knows who waits."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cloud_node.engine import Opening
from cloud_node.in_process import InProcessEngine
from cloud_node.span import Span
from cloud_node.turns import Ticket
from isthmus.cut import Cut
from isthmus.load import load_span
from isthmus.rows import Rows
from tests.faults.training import wait_until
from tests.parity.reference import relative
from tests.parity.test_families import configuration, save

CUT = Cut(1, 1)
HIDDEN = 32
PATIENCE_S = 60
EXACT = 1e-5
LENGTHS = ((9,), (8, 6), (10,), (9, 9))
FAMILIES = ("llama", "gpt2", "bloom", "opt", "mistral", "mixtral")


def hidden(rows: Rows, seed: int) -> torch.Tensor:
    return torch.randn(rows.tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def rows(*lengths: int, wanted: torch.Tensor | None = None) -> Rows:
    return Rows(lengths, (0,) * len(lengths), wanted)


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and relative({"": ours}, {"": theirs}) < EXACT


class Held:
    """An engine whose device is held until told, and requests that wait for it in a known order."""

    def __init__(self, engine: InProcessEngine) -> None:
        self.engine = engine
        self.ran: list[tuple[int, ...]] = []  # row lengths of each run of the device
        self.breaks = ""  # where a run of several rows is to fail
        self._free = threading.Event()
        self._pool = ThreadPoolExecutor(64)
        span = engine._spans[CUT]
        forward, decode, settle = span.forward, span.decode, span.settle

        def noted_forward(hidden_ND: torch.Tensor, rows: Rows) -> torch.Tensor:
            self._note(rows)
            return forward(hidden_ND, rows)

        def noted_decode(hidden_ND: torch.Tensor, rows: Rows, state: Any) -> Any:
            done = decode(hidden_ND, rows, state)
            self._note(rows)  # so that one that is to fail has done its harm
            return done

        def breaking_settle() -> None:
            settle()
            self._break("settling")

        span.forward, span.decode = noted_forward, noted_decode  # type: ignore[method-assign]
        span.settle = breaking_settle  # type: ignore[method-assign]

    def open(self, session: str, tenant: str | None = None, **opening: Any) -> None:
        self.engine.open(session, Opening(CUT, tenant=tenant or session, **opening))

    def hold(self) -> None:
        """Have the device taken by a tenant of its own until `let_go`."""
        holds, self._free = threading.Event(), threading.Event()
        free = self._free

        def hold() -> None:
            with self.engine._turns.turn(Ticket("holder", "holder", 1.0)):
                holds.set()
                assert free.wait(PATIENCE_S)

        self._pool.submit(hold)
        assert holds.wait(PATIENCE_S)

    def _note(self, rows: Rows) -> None:
        self.ran.append(rows.lengths)
        self._break("in the span")

    def _break(self, where: str) -> None:
        if self.breaks == where and len(self.ran[-1]) > 1:
            raise torch.OutOfMemoryError("no room for so many rows")

    def wait(self, request: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """A request that now waits behind those before it."""
        waiting = self.engine.load().waiting
        future = self._pool.submit(request, *arguments)
        wait_until(lambda: self.engine.load().waiting > waiting, "the request to wait")
        return future

    def forward(self, session: str, rows: Rows, seed: int, keep: bool = False) -> "Future[Any]":
        return self.wait(self.engine.forward, session, seed, hidden(rows, seed), rows, keep)

    def let_go(self) -> None:
        self._free.set()

    def end(self) -> None:
        self.let_go()
        self._pool.shutdown()


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved tiny model of each family that is asked for."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp(family), configuration(family))
        return made[family]

    return of


@pytest.fixture
def engine_of(directories: Callable[[str], Path]) -> Callable[..., InProcessEngine]:
    """An engine of a family."""

    def of(family: str, budget: int = 1 << 30, **settings: Any) -> InProcessEngine:
        span = Span(*load_span(directories(family), CUT, torch.float32), CUT)
        return InProcessEngine({CUT: span}, "cpu", HIDDEN, budget, **settings)

    return of


@pytest.fixture
def held_of(engine_of: Callable[..., InProcessEngine]) -> Iterator[Callable[..., Held]]:
    """An engine of a family whose device is held by a test."""
    made: list[Held] = []

    def of(family: str = "llama", budget: int = 1 << 30, **settings: Any) -> Held:
        made.append(Held(engine_of(family, budget, **settings)))
        return made[-1]

    yield of
    for held in made:
        held.end()
