"""Passes that wait at ports: what they hold counts, and nothing of one that failed lives on."""

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cloud_node.asks import Asks, Line
from cloud_node.engine import Asked, Opening
from cloud_node.in_process import InProcessEngine
from cloud_node.span import Span
from isthmus.cut import Cut
from isthmus.errors import UnreachableError, WireError
from isthmus.load import load_span
from isthmus.ports import LORA, Port
from isthmus.round_trips import Question, RoundTrips
from isthmus.rows import Rows
from isthmus.wire.gen import backbone_pb2 as pb
from tests.parity.reference import HIDDEN
from tests.parity.test_families import configuration, save

CUT = Cut(0, 0)
ROWS = Rows((20,) * 4, (0,) * 4)


def engine_of(family: str, place: Path, budget: int = 1 << 40) -> InProcessEngine:
    span = Span(*load_span(save(place, configuration(family)), CUT, torch.float32), CUT)
    engine = InProcessEngine({CUT: span}, "cpu", HIDDEN, budget)
    ports = tuple(Port(block, module=module, kind=LORA) for block, module in sorted(span.linears))
    engine.open("a", Opening(CUT, ports))
    return engine


def hidden() -> torch.Tensor:
    return torch.randn(ROWS.tokens, HIDDEN, generator=torch.Generator().manual_seed(0))


@contextmanager
def births(patch: pytest.MonkeyPatch) -> Iterator[list["weakref.ref[RoundTrips]"]]:
    """What every pass holds of its ports, for as long as it lives."""
    born: list[weakref.ref[RoundTrips]] = []
    begin = RoundTrips.__init__

    def note(self: RoundTrips, *args: object) -> None:
        begin(self, *args)  # type: ignore[arg-type]
        born.append(weakref.ref(self))

    patch.setattr(RoundTrips, "__init__", note)
    yield born


class Fails:
    """An edge that answers so many questions and no more."""

    def __init__(self, answers: int) -> None:
        self._left = answers

    def ask(self, question: Question) -> list[torch.Tensor]:
        """See `Edge`."""
        self._left -= 1
        if self._left < 0:
            raise WireError("gone")
        return [torch.zeros(len(question.tensors[0]), width) for width in question.widths]


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("answers", range(6))
def test_nothing_of_a_pass_that_failed_at_a_port_lives_on(
    family: str, answers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In phi a block's attention and its MLP share their input, and run apart."""
    engine = engine_of(family, tmp_path)
    sites = frozenset(engine.describe().linears)
    with births(monkeypatch) as born:
        for microbatch in range(3):
            asked = Asked(sites, Fails(answers), input_gradient=False)
            with pytest.raises(WireError, match="gone"):
                engine.forward("a", microbatch, hidden(), ROWS, True, asked)
    del asked
    gc.collect()
    assert [ref() for ref in born] == [None] * 3


def test_passes_that_a_closed_session_leaves_waiting_are_gone_without_the_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asks = engine_of("llama", tmp_path), Asks()
    sites = frozenset(engine.describe().linears)
    waiting = threading.Semaphore(0)
    asks.resume(lambda _: waiting.release())

    def run(microbatch: int) -> str:
        key = pb.Key(microbatch=microbatch, pass_kind=pb.PASS_FORWARD)
        try:
            engine.forward("a", microbatch, hidden(), ROWS, True, Asked(sites, Line(key, asks, "none")))
        except UnreachableError:
            return "ended"
        return "answered"

    gc.disable()
    try:
        with births(monkeypatch) as born, ThreadPoolExecutor(4) as pool:
            running = [pool.submit(run, microbatch) for microbatch in range(4)]
            assert waiting.acquire(timeout=30)
            asks.end(UnreachableError("closed"))
            assert [one.result(30) for one in running] == ["ended"] * 4
        assert [ref() for ref in born] == [None] * len(born)
    finally:
        gc.enable()


def test_what_passes_hold_while_they_wait_counts_against_the_budget_and_in_the_peak(tmp_path: Path) -> None:
    engine = engine_of("llama", tmp_path)
    sites = frozenset(engine.describe().linears)
    resident = engine.load().peak_bytes
    assert engine.forward("a", 1, hidden(), ROWS, True, Asked(sites, Fails(1000))).kept
    one = engine.load().peak_bytes - resident
    engine.release("a", [1], [])
    held: list[int] = []

    class Nested(Fails):
        """Lets a second pass run while the first waits at its first port."""

        def ask(self, question: Question) -> list[torch.Tensor]:
            """See `Edge`."""
            if not held:
                held.append(0)
                other = ThreadPoolExecutor(1).submit(
                    engine.forward, "a", 3, hidden(), ROWS, True, Asked(sites, Fails(1000))
                )
                assert other.result(30).kept
            return super().ask(question)

    assert engine.forward("a", 2, hidden(), ROWS, True, Asked(sites, Nested(1000))).kept
    assert engine.load().peak_bytes - resident == 2 * one > 0
