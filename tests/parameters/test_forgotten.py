"""What a step leaves on the cloud: nothing, once its gradients were answered; and nobody else ever sees any of it."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cloud_node.engine import Asked, Opening
from cloud_node.in_process import InProcessEngine
from cloud_node.loading import load_spans
from isthmus.attached import Values
from isthmus.cut import Cut
from isthmus.errors import NotKeptError, WireError
from isthmus.ports import LORA_VALUES, Port
from isthmus.rows import Rows

CUT, HIDDEN, RANK = Cut(1, 1), 32, 4
SITES = ((1, "self_attn.q_proj"), (3, "mlp.down_proj"))
SIZES = ((32, 32), (64, 32))
ROWS = Rows((7, 5), (0, 0))
PORTS = tuple(Port(block, module=module, kind=LORA_VALUES) for block, module in SITES)


@pytest.fixture
def engine(tiny_models: dict[str, Path]) -> Iterator[InProcessEngine]:
    spans = load_spans(tiny_models["llama"], [CUT], torch.float32, torch.device("cpu"))
    engine = InProcessEngine(spans, "cpu", HIDDEN, 1 << 28)
    engine.open("training", Opening(CUT, PORTS))
    engine.open("plain", Opening(CUT, alone=True))
    yield engine
    engine.stop()


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values(seed: int) -> dict[tuple[int, str], Values]:
    return {
        site: Values(LORA_VALUES, (drawn(RANK, inputs, seed=seed), drawn(outputs, RANK, seed=seed + 1)))
        for site, (inputs, outputs) in zip(SITES, SIZES, strict=True)
    }


def passes(engine: InProcessEngine, session: str, microbatch: int, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
    output_ND = engine.forward(session, microbatch, drawn(12, HIDDEN, seed=1), ROWS, True, asked).tensor_KD
    gradient_ND = engine.backward(session, microbatch, drawn(12, HIDDEN, seed=2), None, asked).tensor_KD
    return output_ND, gradient_ND


def test_nothing_of_values_and_gradients_remains_after_they_were_answered(engine: InProcessEngine) -> None:
    engine.attach("training", 10, values(3))
    asked = Asked(parked=10)
    passes(engine, "training", 11, asked)
    engine.forward("training", 12, drawn(12, HIDDEN, seed=4), ROWS, True, asked)  # no backward follows
    held = engine._sessions["training"].attached  # what is to be forgotten can only be named from within
    assert held is not None
    assert engine.load().held_bytes > 2 * held.count * 4
    watched = [weakref.ref(tensor) for tensor in (*held.leaves, *held._gradients[11])]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in held.leaves}
    assert len(watched) == 8
    del held
    answer = engine.gradients("training", 10, [11])
    assert [tuple(one.shape) for one in answer.gradients] == [(4, 32), (32, 4), (4, 64), (32, 4)]
    assert all(bool(one.any()) for one in answer.gradients)
    del answer
    gc.collect()
    assert [one() for one in watched] == [None] * 8
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    assert not addresses & {one.untyped_storage().data_ptr() for one in tensors if one.shape[:1] == (RANK,)}
    assert engine.load().held_bytes == 0
    for again in (lambda: engine.gradients("training", 10, [11]), lambda: passes(engine, "training", 13, asked)):
        with pytest.raises(NotKeptError, match="gone"):
            again()


def test_a_closed_session_leaves_nothing(engine: InProcessEngine) -> None:
    engine.attach("training", 10, values(3))
    held = engine._sessions["training"].attached
    assert held is not None
    watched = [weakref.ref(tensor) for tensor in held.leaves]
    del held
    engine.close("training")
    gc.collect()
    assert [one() for one in watched] == [None] * 4


def test_a_session_beside_computes_the_same_bits_before_between_and_after(engine: InProcessEngine) -> None:
    before = passes(engine, "plain", 1, Asked())
    engine.attach("training", 10, values(3))
    mine = engine.forward("training", 11, drawn(12, HIDDEN, seed=1), ROWS, True, Asked(parked=10)).tensor_KD
    between = passes(engine, "plain", 2, Asked())
    engine.backward("training", 11, drawn(12, HIDDEN, seed=2), None, Asked(parked=10))
    engine.gradients("training", 10, [11])
    after = passes(engine, "plain", 3, Asked())
    assert not torch.allclose(mine, before[0], atol=1e-2)
    for one, other in zip(before * 2, between + after, strict=True):
        assert torch.equal(one, other)
    assert all(not parameter.requires_grad for span in engine._spans.values() for parameter in span._base.parameters())


def test_a_backward_that_runs_twice_counts_once(engine: InProcessEngine) -> None:
    engine.attach("training", 10, values(3))
    asked, gradient_ND, again = Asked(parked=10), drawn(12, HIDDEN, seed=2), (drawn(12, HIDDEN, seed=1), ROWS)
    engine.forward("training", 11, again[0], ROWS, True, asked)
    for _ in range(3):
        engine.backward("training", 11, gradient_ND, again, asked)
    found = engine.gradients("training", 10, [11]).gradients
    engine.attach("training", 20, values(3))
    passes(engine, "training", 21, Asked(parked=20))
    for one, other in zip(found, engine.gradients("training", 20, [21]).gradients, strict=True):
        assert torch.equal(one, other)


def test_a_forward_kept_with_earlier_values_is_not_used_for_later_ones(engine: InProcessEngine) -> None:
    engine.attach("training", 10, values(3))
    engine.forward("training", 11, drawn(12, HIDDEN, seed=1), ROWS, True, Asked(parked=10))
    engine.attach("training", 20, values(5))
    with pytest.raises(NotKeptError, match="send its input again"):
        engine.backward("training", 11, drawn(12, HIDDEN, seed=2), None, Asked(parked=20))


def test_values_that_do_not_fit_their_module_are_refused(engine: InProcessEngine) -> None:
    for shapes in (((4, 31), (32, 4)), ((4, 32), (32, 5)), ((33, 32), (32, 33)), ((4,), (32, 4))):
        wrong = Values(LORA_VALUES, (torch.zeros(shapes[0]), torch.zeros(shapes[1])))
        with pytest.raises(WireError, match="do not fit"):
            engine.attach("training", 10, {SITES[0]: wrong})
