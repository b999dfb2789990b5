"""Dropout's masks are a function of seed, step, microbatch and module: the same across the wire and in one process."""

from pathlib import Path

import peft
import pytest
import torch

from edge_client.dropout import Draw, SeededDropout, drawing
from edge_client.step import Gradients
from isthmus.ledger.record import Ledger
from isthmus.training.collate import summed_loss
from isthmus.wire.gen import backbone_pb2 as pb
from tests.dlora.reference import (
    ALL,
    CUTS,
    every_block,
    gradients,
    in_one_process,
    overhear,
    ports,
    same_bits,
    with_ports,
)
from tests.harness import Server
from tests.parity.reference import ALPHA, RANK, ragged_sequences, random_values, relative, set_values, whole_model
from tests.parity.test_training import EXACT, LENGTHS, assert_same, in_microbatches

SHARE = 0.3


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_across_the_wire_the_same_values_are_dropped_as_in_one_process(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str, cut: str, microbatches: int
) -> None:
    sequences = ragged_sequences(LENGTHS)
    alone, alike = in_one_process(tiny_models[family], cut, ALL, SHARE)
    values = random_values(alike.trainable)
    alike.load(values)
    theirs = gradients(alone, alike, sequences, microbatches, seed=5, step=7)
    with with_ports(servers[family], cut, ALL, dropout=SHARE) as (edge, tuning):
        tuning.load(values)
        assert_same(gradients(edge, tuning, sequences, microbatches, seed=5, step=7), theirs)
    other = gradients(alone, alike, sequences, microbatches, seed=5, step=8)
    assert relative(other.by_name, theirs.by_name) > 0.05, "masks that do not matter compare nothing"


def test_masks_differ_by_seed_by_step_and_by_microbatch_and_come_again_with_the_same(
    servers: dict[str, Server],
) -> None:
    row = ragged_sequences((12,))
    with with_ports(servers["llama"], "0:0", ["q_proj", "v_proj"], dropout=SHARE) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))

        def found(seed: int, step: int) -> Gradients:
            return gradients(edge, tuning, row, 1, seed=seed, step=step)

        once = found(0, 0)
        assert same_bits(found(0, 0), once)
        for other in (found(1, 0), found(0, 1)):
            assert other.loss != once.loss
            assert relative(other.by_name, once.by_name) > 0.05
        both = gradients(edge, tuning, row * 2, 2)  # the same row in two microbatches
        assert relative(both.by_name, once.by_name) > 0.05


def test_outside_training_nothing_is_dropped(servers: dict[str, Server], tiny_models: dict[str, Path]) -> None:
    ids_BT = torch.arange(3, 27).view(2, 12)
    with with_ports(servers["llama"], "1:1", ALL, dropout=SHARE) as (_, tuning), torch.no_grad():
        tuning.load(random_values(tuning.trainable))
        modules = every_block("llama")
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=SHARE, target_modules=modules
        )
        plain = peft.get_peft_model(whole_model(tiny_models["llama"]), config).eval()
        set_values(plain, tuning.values())
        assert relative({"": tuning.model(ids_BT).logits}, {"": plain(ids_BT).logits}) < EXACT


@pytest.mark.parametrize("share", [0.0, SHARE])
def test_a_forward_run_again_because_the_cloud_forgot_it_asks_again_and_gives_the_same_gradients(
    servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    [batch] = in_microbatches(ragged_sequences((9, 5, 12)), 1)
    draw = Draw(0, 0, 0, batch.attention_mask_BT.reshape(-1).nonzero()[:, 0], batch.attention_mask_BT.numel())
    ledger, found = Ledger(), []
    heard = overhear(monkeypatch)
    with with_ports(servers["llama"], "1:1", ["q_proj", "v_proj"], ledger, dropout=share) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))
        for forgets in (False, True):
            with drawing(draw):
                loss = summed_loss(tuning.model, batch, torch.device("cpu"))
            if forgets:
                assert edge.link is not None
                microbatch = 2  # the session's second request of its kind
                edge.link.release([pb.Key(microbatch=microbatch, pass_kind=pb.PASS_FORWARD)], [])
            found.append(torch.autograd.grad(loss, list(tuning.trainable.values())))
            assert ledger.total("train", "recomputed_calls") == int(forgets)
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))
    assert [asked.backward for asked in heard].count(False) == 3 * 4  # four blocks; one forward is run twice
    assert [asked.backward for asked in heard].count(True) == 2 * 4


def test_a_question_answered_twice_has_one_answer_and_leaves_one_gradient(servers: dict[str, Server]) -> None:
    generator = torch.Generator().manual_seed(0)
    with with_ports(servers["llama"], "0:0", ["q_proj", "v_proj"], dropout=SHARE) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))
        modules = ["self_attn.q_proj", "self_attn.v_proj"]
        ports(edge).active = frozenset((2, module) for module in modules)
        with drawing(Draw(0, 0, 0, None, 7)):
            work = ports(edge).begin("train")
        hidden_ND = torch.randn(7, 32, generator=generator)
        outward = [torch.randn(7, width, generator=generator) for width in (32, 16)]
        forward = pb.PortCall(block=2, modules=modules, wanted=True)
        backward = pb.PortCall(block=2, modules=modules, wanted=True, backward=True)
        found = []
        for _ in range(2):
            added, down = work.answer(forward, [hidden_ND]), work.answer(backward, outward)
            again = work.answer(backward, outward)
            found += [[*added, *down, *work.gradients()], [*added, *again, *work.gradients()]]
        for other in found[1:]:
            assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_a_share_of_the_values_is_dropped_and_the_mean_stays() -> None:
    hidden_ND = torch.ones(400, 64)
    with drawing(Draw(0, 0, 0, None, 400)):
        dropped_ND = SeededDropout(SHARE, "here")(hidden_ND)
        assert not torch.equal(SeededDropout(SHARE, "there")(hidden_ND), dropped_ND)
    assert float((dropped_ND == 0).float().mean()) == pytest.approx(SHARE, abs=0.01)
    assert torch.allclose(dropped_ND[dropped_ND != 0], torch.tensor(1 / (1 - SHARE)))
    assert torch.equal(SeededDropout(SHARE, "here")(hidden_ND), hidden_ND)


def test_a_real_token_has_its_mask_whether_the_batch_is_padded_or_packed() -> None:
    index_N = torch.tensor([0, 1, 2, 4, 8, 9, 10, 11])
    padded_ND = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    with drawing(Draw(0, 0, 0, index_N, 12)):
        layer = SeededDropout(SHARE, "here")
        packed, padded = layer(padded_ND[index_N]), layer(padded_ND.view(3, 4, 16))
    assert torch.equal(padded.view(12, 16)[index_N], packed)
