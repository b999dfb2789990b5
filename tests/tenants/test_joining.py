"""What waits and fits is computed together, and everyone gets what they would have got alone."""

from collections.abc import Callable

import pytest
import torch

from cloud_node.engine import Answer, Place
from isthmus.errors import LimitError, NotKeptError
from isthmus.ports import Port
from tests.tenants.conftest import CUT, FAMILIES, LENGTHS, PATIENCE_S, Held, hidden, near, rows


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
    held.breaks = "in the span"
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
