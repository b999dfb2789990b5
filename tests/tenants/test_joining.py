"""What waits and fits is computed together, and everyone gets what they would have got alone."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from cloud_node.engine import Answer, Opening, Place
from cloud_node.in_process import InProcessEngine
from isthmus.errors import LimitError, NotKeptError
from isthmus.ports import Port
from isthmus.rows import Rows
from tests.parity.reference import relative
from tests.tenants.conftest import CUT, FAMILIES, PATIENCE_S, Held, hidden

EXACT = 1e-5
LENGTHS = ((9,), (8, 6), (10,), (9, 9))
STEPS = (1, 1, 3, 1)
"""Tokens that follow a sequence's beginning, request by request."""


def rows(*lengths: int, wanted: torch.Tensor | None = None) -> Rows:
    return Rows(lengths, (0,) * len(lengths), wanted)


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and relative({"": ours}, {"": theirs}) < EXACT


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
def test_forwards_of_several_tenants_run_as_one_and_each_gets_what_it_gets_alone(
    family: str, held_of: Callable[..., Held]
) -> None:
    held = held_of(family)
    held.hold()
    asked = [rows(*lengths) for lengths in LENGTHS]
    asked[1] = rows(8, 6, wanted=torch.arange(14) % 3 == 0)
    for tenant in range(len(asked)):
        held.open(f"tenant {tenant}")
        held.open(f"alone {tenant}", alone=True)
    together = [held.forward(f"tenant {tenant}", one, tenant) for tenant, one in enumerate(asked)]
    held.let_go()
    for tenant, (future, one) in enumerate(zip(together, asked, strict=True)):
        answer: Answer = future.result(PATIENCE_S)
        alone = held.engine.forward(f"alone {tenant}", 1, hidden(one, tenant), one, False)
        assert near(answer.tensor_KD, alone.tensor_KD)
        assert answer.tensor_KD.untyped_storage().nbytes() == answer.tensor_KD.nbytes, "it holds nobody else's"
        assert answer.work.forward_flops == alone.work.forward_flops > 0
    assert held.ran[0] == (9, 8, 6, 10, 9, 9)
    assert held.engine.load().batches[4] == 1


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


def test_rows_that_differ_much_in_length_are_not_padded_with_each_other(held_of: Callable[..., Held]) -> None:
    held = held_of()
    held.hold()
    for tenant, length in enumerate((8, 20, 10, 24)):
        held.open(f"tenant {tenant}")
        held.forward(f"tenant {tenant}", rows(length), tenant)
    held.let_go()
    held.end()
    assert held.ran == [(8, 10), (20, 24)]


def test_no_more_rows_are_joined_than_the_engine_is_told(held_of: Callable[..., Held]) -> None:
    for most, ran in ((3, [(5, 5, 5), (5, 5)]), (1, [(5,)] * 5)):
        held = held_of(joined_rows=most)
        held.hold()
        for tenant in range(5):
            held.open(f"tenant {tenant}")
            held.forward(f"tenant {tenant}", rows(5), tenant)
        held.let_go()
        held.end()
        assert held.ran == ran


def test_a_deterministic_session_is_never_joined_and_its_bits_are_those_of_one_alone(
    held_of: Callable[..., Held],
) -> None:
    held = held_of()
    held.open("exact", alone=True)
    same = rows(7, 5)
    expected = held.engine.forward("exact", 1, hidden(same, 1), same, False).tensor_KD
    begun = held.engine.decode("exact", 2, hidden(same, 2), same, Place("first", 0, 0)).tensor_KD
    held.hold()
    held.ran.clear()
    exact = [held.forward("exact", same, 1)]
    for tenant in range(3):
        held.open(f"tenant {tenant}")
        held.forward(f"tenant {tenant}", same, 10 + tenant)
    exact += [held.forward("exact", same, 1)]
    decode = held.wait(held.engine.decode, "exact", 2, hidden(same, 2), same, Place("second", 0, 0))
    held.let_go()
    held.end()
    assert all(torch.equal(one.result().tensor_KD, expected) for one in exact)
    assert torch.equal(decode.result().tensor_KD, begun)
    assert sorted(held.ran) == sorted([(7, 5)] * 3 + [(7, 5) * 3])


@pytest.mark.parametrize("kind", ["ports", "training", "weights whose outliers all rows decide"])
def test_what_others_would_change_is_never_joined(kind: str, held_of: Callable[..., Held]) -> None:
    held = held_of()
    held.engine._spans[CUT].joins = kind in ("ports", "training")
    ports = (Port(1, module="self_attn.q_proj", kind="lora"),) if kind == "ports" else ()
    held.hold()
    for tenant in range(3):
        held.open(f"tenant {tenant}", ports=ports)
        held.forward(f"tenant {tenant}", rows(6), tenant, keep=kind == "training")
    held.let_go()
    held.end()
    assert held.ran == [(6,)] * 3


def test_a_run_of_several_that_fails_is_made_good_by_each_alone(
    held_of: Callable[..., Held], engine_of: Callable[..., InProcessEngine]
) -> None:
    """The joined run fails after it has added to every cache; nothing of that is left."""
    lengths = ((9,), (10,), (8,))
    alone = decode_apart(engine_of("llama"), lengths)
    held = held_of()
    by = writers(held.engine, lengths)
    held.break_joined = True
    for step, tokens in enumerate((0, *STEPS)):
        for answer, expected in zip(decode_together(held, by, tokens), alone, strict=True):
            assert near(answer.tensor_KD, expected[step])
    assert (1, 1, 1) in held.ran


def test_one_request_that_cannot_be_computed_fails_by_itself(held_of: Callable[..., Held]) -> None:
    held = held_of()
    held.hold()
    for session in ("good", "bad", "also good"):
        held.open(session)
    futures = {
        "good": held.forward("good", rows(6), 1),
        "bad": held.wait(held.engine.forward, "bad", 2, torch.randn(6, 31), rows(6), False),
        "also good": held.forward("also good", rows(6), 3),
    }
    held.let_go()
    assert futures["bad"].exception(PATIENCE_S) is not None
    assert all(futures[name].result(PATIENCE_S).tensor_KD.isfinite().all() for name in ("good", "also good"))


def test_where_memory_lacks_even_for_one_it_is_told_so(held_of: Callable[..., Held]) -> None:
    held = held_of()
    held.open("large")
    held.break_joined = True
    with pytest.raises(LimitError, match="smaller batches"):
        held.engine.forward("large", 1, hidden(rows(5, 5), 1), rows(5, 5), False)


def test_the_seconds_of_a_joined_run_are_shared_and_add_up_to_what_it_took(
    held_of: Callable[..., Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = held_of()
    held.hold()
    now, futures = iter(range(1000)), []
    for tenant, lengths in enumerate(((8,), (8, 8), (8,))):
        held.open(f"tenant {tenant}")
        futures.append(held.forward(f"tenant {tenant}", rows(*lengths), tenant))
    monkeypatch.setattr("cloud_node.batching.time.perf_counter", lambda: float(next(now)))
    held.let_go()
    work = [future.result(PATIENCE_S).work for future in futures]
    assert [one.forward_s for one in work] == [0.25, 0.5, 0.25], "one tick of the clock for four rows"


def test_a_closed_sessions_request_waits_no_longer_and_the_others_get_their_answers(
    held_of: Callable[..., Held],
) -> None:
    held = held_of()
    held.hold()
    for session in ("stays", "goes"):
        held.open(session)
    stays, goes = held.forward("stays", rows(6), 1), held.forward("goes", rows(6), 2)
    held.engine.close("goes")
    with pytest.raises(NotKeptError, match="closed"):
        goes.result(PATIENCE_S)
    assert held.engine.load().waiting == 1
    held.let_go()
    assert stays.result(PATIENCE_S).tensor_KD.shape == (6, 32)
