"""Tenants that decode are computed together, whatever their pasts, and a failure of that leaves no trace."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from cloud_node.batching import Batch, _JoinedCache
from cloud_node.engine import Answer, Opening, Place
from cloud_node.in_process import InProcessEngine
from isthmus.rows import Rows
from tests.tenants.conftest import CUT, FAMILIES, LENGTHS, PATIENCE_S, Held, hidden, near, rows

STEPS = (1, 1, 3, 1)
"""Tokens that follow a sequence's beginning, request by request."""


class Writer:
    """A tenant that decodes: rows that grow by a few tokens at a time."""

    def __init__(self, number: int, lengths: tuple[int, ...]) -> None:
        self.name, self._lengths = f"tenant {number}", lengths
        self._width, self._made, self._seed = 0, 0, 1000 * number

    def request(self, tokens: int = 0) -> tuple[Any, ...]:
        """What `engine.decode` takes to begin the sequence, or to add tokens; the next one follows it."""
        self._seed += 1
        grown = self._width - max(self._lengths)
        now = rows(*self._lengths) if not tokens else _following(self._lengths, grown, tokens)
        place = Place("sequence", self._width, self._made)
        self._width, self._made = self._width + now.longest, self._made + 1
        return self.name, self._made, hidden(now, self._seed), now, place


def _following(lengths: Sequence[int], grown: int, tokens: int) -> Rows:
    return Rows((tokens,) * len(lengths), tuple(length + grown for length in lengths))


def writers(engine: InProcessEngine, lengths: Sequence[tuple[int, ...]]) -> list[Writer]:
    made = [Writer(number, each) for number, each in enumerate(lengths)]
    for writer in made:
        engine.open(writer.name, Opening(CUT, tenant=writer.name))
    return made


def decode_apart(engine: InProcessEngine, lengths: Sequence[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    """What each writer gets alone, step by step."""
    return [
        [engine.decode(*writer.request(tokens)).tensor_KD for tokens in (0, *STEPS)]
        for writer in writers(engine, lengths)
    ]


def decode_together(held: Held, by: Sequence[Writer], tokens: int) -> list[Answer]:
    held.hold()
    futures = [held.wait(held.engine.decode, *writer.request(tokens)) for writer in by]
    held.let_go()
    return [future.result(PATIENCE_S) for future in futures]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_of_several_tenants_runs_as_one_and_each_gets_what_it_gets_alone(
    family: str, held_of: Callable[..., Held], engine_of: Callable[..., InProcessEngine]
) -> None:
    """Beginnings of several lengths, some with padding of their own, are joined; then what follows them."""
    alone = decode_apart(engine_of(family), LENGTHS)
    held = held_of(family)
    by = writers(held.engine, LENGTHS)
    for step, tokens in enumerate((0, *STEPS)):
        for answer, expected in zip(decode_together(held, by, tokens), alone, strict=True):
            assert near(answer.tensor_KD, expected[step]), step
    assert held.engine.load().batches[4] == 1 + len(STEPS)


def test_pasts_of_widths_within_a_factor_of_two_are_joined_and_each_keeps_memory_of_its_own(
    held_of: Callable[..., Held], engine_of: Callable[..., InProcessEngine]
) -> None:
    lengths = ((6,), (11, 4), (25,))
    alone = decode_apart(engine_of("llama"), lengths)
    held = held_of("llama")
    by = writers(held.engine, lengths)
    for writer in by:
        held.engine.decode(*writer.request())
    held.ran.clear()
    for step, tokens in enumerate(STEPS, start=1):
        for answer, expected in zip(decode_together(held, by, tokens), alone, strict=True):
            assert near(answer.tensor_KD, expected[step])
    assert held.ran[:2] == [(1, 1, 1), (1,)]
    caches = [held.engine._caches.take(writer.name, "sequence") for writer in by]
    for state in caches:
        assert state is not None
        stored = {tensor.untyped_storage() for layer in state.cache.layers for tensor in (layer.keys, layer.values)}
        assert sum(storage.nbytes() for storage in stored) == state.size


def test_a_decode_that_ran_with_others_may_come_again(
    held_of: Callable[..., Held], engine_of: Callable[..., InProcessEngine]
) -> None:
    alone = decode_apart(engine_of("llama"), LENGTHS)
    held = held_of("llama")
    by = writers(held.engine, LENGTHS)
    for writer in by:
        held.engine.decode(*writer.request())
    requests = [writer.request(STEPS[0]) for writer in by]
    for _ in range(3):
        held.hold()
        futures = [held.wait(held.engine.decode, *request) for request in requests]
        held.let_go()
        for future, expected in zip(futures, alone, strict=True):
            assert near(future.result(PATIENCE_S).tensor_KD, expected[1])
    assert held.engine.load().batches[4] == 3
    for writer, expected in zip(by, alone, strict=True):
        assert near(held.engine.decode(*writer.request(STEPS[1])).tensor_KD, expected[2])


@pytest.mark.parametrize("where", ["in the span", "settling", "splitting", "between keys and values"])
def test_decoding_together_that_fails_is_made_good_by_each_alone(
    where: str,
    held_of: Callable[..., Held],
    engine_of: Callable[..., InProcessEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever it fails, and whatever it has added to caches until then; nothing of that is left."""
    lengths = ((9,), (10,), (8,))
    alone = decode_apart(engine_of("llama"), lengths)
    held = held_of()
    by = writers(held.engine, lengths)
    held.breaks = where
    if where == "splitting":
        monkeypatch.setattr(Batch, "_split", _fail)
    if where == "between keys and values":
        monkeypatch.setattr(_JoinedCache, "update", _add_keys_and_fail)
    for step, tokens in enumerate((0, *STEPS)):
        for answer, expected in zip(decode_together(held, by, tokens), alone, strict=True):
            assert near(answer.tensor_KD, expected[step]), step
    assert held.engine.load().batches[3] == 1 + len(STEPS), "each was tried together"


def _fail(*_: Any) -> None:
    raise torch.OutOfMemoryError("no room for so many rows")


def _add_keys_and_fail(
    joined: _JoinedCache, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any
) -> Any:
    """What `update` has done in the first of the span's layers when there is no memory left for values."""
    joined._reach(layer_idx + 1)
    if layer_idx < CUT.bottom:
        return joined.layers[layer_idx].update(key_states, value_states)
    past, rows, tokens = joined.layers[layer_idx]._parts[0]
    if not past.is_initialized:
        past.lazy_initialization(key_states, value_states)
    past.keys = torch.cat([past.keys, key_states[rows, :, -tokens:]], -2)
    return _fail()
