"""What the cloud keeps between forward and backward changes the cost, never the result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cloud_node.activations import ActivationStore, Kept
from cloud_node.engine import Opening
from cloud_node.in_process import InProcessEngine
from cloud_node.loading import load_spans
from edge_client.config import TrainConfig
from edge_client.passes import Sent
from isthmus.cut import Cut
from isthmus.rows import Rows
from isthmus.training.batches import batch_at, split_rows
from isthmus.training.data import read_examples
from tests.faults.conftest import Adapter
from tests.faults.training import Learner, adapter, learning, run_here, same_bits, settings, wait_until
from tests.harness import Server, byte_tokenizer, serving

ROWS = Rows((40, 24), (0, 0))
CUT = Cut(1, 1)
WIDTH = 32


def hidden(seed: int) -> torch.Tensor:
    return torch.randn(ROWS.tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def engine_of(tiny_models: dict[str, Path]) -> Callable[[int], InProcessEngine]:
    spans = load_spans(tiny_models["llama"], [CUT], torch.float32, torch.device("cpu"))
    return lambda budget: InProcessEngine(spans, "cpu", WIDTH, budget)


@pytest.fixture(scope="module")
def size(engine_of: Callable[[int], InProcessEngine]) -> int:
    """Bytes that one forward over `ROWS` keeps."""
    engine = engine_of(1 << 30)
    engine.open("alone", Opening(CUT))
    before = engine.load().peak_bytes
    assert engine.forward("alone", 1, hidden(1), ROWS, keep=True).kept
    return engine.load().peak_bytes - before


@pytest.fixture(scope="module")
def budgeted(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Callable[[int], object]:
    own = tmp_path_factory.mktemp("budgeted")

    @contextmanager
    def serve(budget: int) -> Iterator[Server]:
        with serving(tiny_models["llama"], "--cut", "1:1", "--activation-budget", str(budget), cache=own) as server:
            yield server

    return serve


@pytest.fixture(scope="module")
def keeps_nothing(budgeted: Callable[[int], object]) -> Iterator[Server]:
    with budgeted(0) as server:
        yield server


@pytest.fixture(scope="module")
def keeps_two(budgeted: Callable[[int], object], size: int) -> Iterator[Server]:
    """A server with room for two forwards over `ROWS` and a half."""
    with budgeted(5 * size // 2) as server:
        yield server


@pytest.mark.parametrize("microbatches", [1, 4])
def test_with_nothing_kept_a_run_ends_with_the_same_bits_and_reports_what_that_cost(
    keeps_nothing: Server, rows: Path, tmp_path: Path, undisturbed: Callable[..., Adapter], microbatches: int
) -> None:
    report = run_here(settings(keeps_nothing, rows, microbatches=microbatches), tmp_path / "run")
    assert same_bits(adapter(tmp_path / "run"), undisturbed(microbatches=microbatches))
    cloud, wire = report.cost.cloud, report.cost.wire
    assert cloud.recomputed_calls == report.steps * microbatches
    assert cloud.recompute_flops is not None
    assert cloud.forward_flops == 2 * cloud.recompute_flops > 0
    assert wire.resent_bytes == report.tokens.real * WIDTH * 4


def microbatch_positions(config: TrainConfig) -> list[int]:
    """Positions that each microbatch of a run computes, padding included."""
    examples = read_examples(config.data, byte_tokenizer(), config.max_length).examples
    lengths = tuple(len(example.train.ids) for example in examples)
    batches = [batch_at(lengths, config.batch_size, config.seed, step) for step in range(config.steps or 0)]
    parts = [part for batch in batches for part in split_rows(batch, config.microbatches)]
    return [len(part) * (max(lengths[row] for row in part) - 1) for part in parts]


def test_with_some_kept_a_run_ends_with_the_same_bits(
    budgeted: Callable[[int], Any],
    keeps_nothing: Server,
    size: int,
    rows: Path,
    tmp_path: Path,
    undisturbed: Callable[..., Adapter],
) -> None:
    """The budget lies between what a small and a large microbatch keep, whatever is in flight at once."""
    positions = microbatch_positions(settings(keeps_nothing, rows, microbatches=4))
    assert 2 * min(positions) < max(positions)
    budget = size * (min(positions) + max(positions)) // (2 * len(ROWS.lengths) * ROWS.longest)
    with budgeted(budget) as server:
        report = run_here(settings(server, rows, microbatches=4), tmp_path / "run")
    assert same_bits(adapter(tmp_path / "run"), undisturbed(microbatches=4))
    assert report.cost.cloud.recomputed_calls is not None
    assert 0 < report.cost.cloud.recomputed_calls < 4 * report.steps
    assert 0 < report.cost.wire.resent_bytes < report.tokens.real * WIDTH * 4


def test_with_everything_kept_a_run_recomputes_and_resends_nothing(
    servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    cost = run_here(settings(servers["llama"], rows, steps=2, microbatches=4), tmp_path / "run").cost
    assert (cost.cloud.recomputed_calls, cost.cloud.recompute_flops, cost.wire.resent_bytes) == (0, 0, 0)


def alone(server: Server) -> Server:
    """The server, once the sessions of earlier tests are gone and hold no share."""
    wait_until(lambda: server.log.count("session opened") == server.log.count("session closed"), "sessions to close")
    return server


def forward(edge: Learner, seed: int) -> Sent:
    return edge.remote.forward(hidden(seed), ROWS, keep=True)[1]


def test_over_budget_the_newest_is_not_kept_and_every_gradient_is_right(keeps_two: Server, rows: Path) -> None:
    gradient = hidden(9)
    with learning(settings(alone(keeps_two), rows)) as edge:
        sent = [forward(edge, seed) for seed in range(4)]
        assert [each.kept for each in sent] == [True, True, False, False]
        found = [edge.remote.backward(each, gradient) for each in sent]
        again = [edge.remote.backward(forward(edge, seed), gradient) for seed in range(4)]
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_each_of_two_sessions_that_keep_has_half_of_the_budget_and_one_beside_an_idle_one_has_it_all(
    keeps_two: Server, rows: Path
) -> None:
    config = settings(alone(keeps_two), rows)
    with learning(config) as one, learning(config) as other:
        assert [forward(edge, 0).kept for edge in (one, other)] == [True, True]
        assert [forward(edge, 1).kept for edge in (one, other)] == [False, False]
    with learning(settings(alone(keeps_two), rows)) as one, learning(config):
        assert [forward(one, seed).kept for seed in range(2)] == [True, True]


def test_what_others_hold_from_when_they_were_alone_still_counts(
    engine_of: Callable[[int], InProcessEngine], size: int
) -> None:
    engine = engine_of(5 * size // 2)
    engine.open("first", Opening(CUT))
    assert [engine.forward("first", number, hidden(number), ROWS, keep=True).kept for number in (1, 2)] == [True, True]
    engine.open("second", Opening(CUT))
    assert not engine.forward("second", 1, hidden(3), ROWS, keep=True).kept
    engine.release("first", [1], [])
    assert engine.forward("second", 2, hidden(3), ROWS, keep=True).kept
    engine.close("second")
    assert engine.forward("first", 3, hidden(4), ROWS, keep=True).kept


def kept(size: int) -> Kept:
    return Kept(torch.empty(0), torch.empty(0), Rows((1,), (0,)), size)


def has_room_for_just(store: ActivationStore, session: str, size: int) -> bool:
    """Whether a pass of `size` bytes may run, and none of a byte more."""
    if store.begin(session, size + 1) or not store.begin(session, size):
        return False
    store.end(session, size)
    return True


def test_passes_that_run_take_room_until_they_end() -> None:
    store = ActivationStore(100, lambda: 1)
    assert store.begin("a", 60)
    assert store.held_bytes == 60
    assert not store.begin("a", 41)
    assert not store.keep("a", 1, kept(41))
    assert store.begin("a", 41, must=True)
    store.end("a", 60)
    store.end("a", 41)
    assert has_room_for_just(store, "a", 100)


def test_over_its_share_the_newest_is_dropped_and_the_oldest_stays() -> None:
    store = ActivationStore(100, lambda: 1)
    assert store.keep("a", 1, kept(60))
    assert not store.keep("a", 2, kept(60))
    assert has_room_for_just(store, "a", 40)
    assert store.take("a", 2) is None
    assert store.take("a", 1) is not None
    assert store.keep("a", 2, kept(60))


def test_shares_are_equal_however_many_sessions_there_are() -> None:
    for sessions in (1, 2, 3, 7):
        store = ActivationStore(840, lambda sessions=sessions: sessions)
        assert all(has_room_for_just(store, name, 840 // sessions) for name in "abc")
        assert store.keep("a", 1, kept(840 // sessions))
        assert not store.keep("a", 2, kept(1))


def test_the_budget_holds_over_all_sessions_while_their_number_changes() -> None:
    opened = ["a"]
    store = ActivationStore(100, lambda: len(opened))
    assert store.keep("a", 1, kept(100))
    opened.append("b")
    assert has_room_for_just(store, "b", 0)
    assert not store.keep("b", 1, kept(50))
    assert store.held_bytes == 100
    store.forget("a")
    assert store.keep("b", 1, kept(50))


def test_a_repeated_forward_replaces_its_first_answer() -> None:
    store = ActivationStore(100, lambda: 1)
    assert store.keep("a", 1, kept(80))
    assert store.keep("a", 1, kept(90))
    assert store.held_bytes == 90


def test_what_was_taken_is_gone() -> None:
    store = ActivationStore(100, lambda: 1)
    store.keep("a", 1, kept(10))
    assert store.take("b", 1) is None
    assert store.take("a", 1) is not None
    assert store.take("a", 1) is None
    assert store.held_bytes == 0
