"""A split step over a real server is the step of one process: loss, gradients, and the adapter after AdamW."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from edge_client.assemble import load_local
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel
from edge_client.step import Gradients, Stepper
from edge_client.tuning import Tuning
from isthmus.errors import CutError
from isthmus.ledger.flops import ModelFlops, PassFlops
from isthmus.ledger.record import Ledger
from isthmus.training.batches import split_rows
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from isthmus.training.optimizer import Optimizer
from tests.conftest import CUTS, FAMILIES
from tests.harness import Server
from tests.parity.reference import (
    BLOCK_LIST,
    HIDDEN,
    adapted_modules,
    attached,
    connected,
    end_blocks,
    padded,
    plain_lora,
    plain_loss,
    ragged_sequences,
    random_values,
    relative,
    trainable,
    whole_model,
)

LENGTHS = (9, 17, 5, 12, 21, 6, 3, 14)
UNCOUNTED = ModelFlops(PassFlops(0, 0), PassFlops(0, 0))
EXACT = 1e-5
"""Relative error, by norm, that float32 sums in another order may make."""
AFTER_ADAMW = 1e-4
"""The same of a whole adapter after five steps: AdamW divides by the gradient's size, so it magnifies tiny ones."""
LOSSY = {"bf16": (1e-4, 0.03), "fp16": (1e-5, 0.005), "int8": (1e-4, 0.05)}
"""Least and greatest relative error of the gradients under a codec."""


@contextmanager
def stepping(edge: EdgeModel, tuning: Tuning, microbatches: int) -> Iterator[Stepper]:
    stepper = Stepper(edge, tuning, Ledger(), UNCOUNTED, microbatches)
    try:
        yield stepper
    finally:
        stepper.close()


def in_microbatches(sequences: Sequence[TokenSequence], count: int) -> list[Batch]:
    parts = split_rows(list(range(len(sequences))), count)
    return [Batch.of([sequences[row] for row in part]) for part in parts]


def split_gradients(edge: EdgeModel, tuning: Tuning, sequences: Sequence[TokenSequence], count: int) -> Gradients:
    with stepping(edge, tuning, count) as stepper:
        return stepper.gradients(in_microbatches(sequences, count))


def plain_gradients(model: torch.nn.Module, sequences: Sequence[TokenSequence]) -> Gradients:
    loss, parameters = plain_loss(model, sequences), trainable(model)
    return Gradients(float(loss), dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True)))


def assert_same(ours: Gradients, theirs: Gradients) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    for name, gradient in theirs.by_name.items():
        assert gradient.norm() > 0, f"{name} has no gradient, so nothing is compared"
        assert relative({name: ours.by_name[name]}, {name: gradient}) < EXACT, name
    assert ours.by_name.keys() == theirs.by_name.keys()


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_those_of_one_process(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str, cut: str, microbatches: int
) -> None:
    sequences = ragged_sequences(LENGTHS)
    with connected(servers[family], cut) as edge:
        tuning = attached(edge)
        tuning.load(random_values(tuning.trainable))
        whole = plain_lora(whole_model(tiny_models[family]), family, adapted_modules(family, cut), tuning.values())
        assert_same(split_gradients(edge, tuning, sequences, microbatches), plain_gradients(whole, sequences))


def test_adapters_on_blocks_and_head_at_once_equal_one_process(
    servers: dict[str, Server], tiny_models: dict[str, Path]
) -> None:
    sequences, targets = ragged_sequences(LENGTHS), ["q_proj", "lm_head"]
    with connected(servers["llama"], "1:1") as edge:
        tuning = attached(edge, targets=targets)
        tuning.load(random_values(tuning.trainable))
        modules = adapted_modules("llama", "1:1", targets)
        whole = plain_lora(whole_model(tiny_models["llama"]), "llama", modules, tuning.values())
        assert_same(split_gradients(edge, tuning, sequences, 2), plain_gradients(whole, sequences))


def assert_five_steps_agree(edge: EdgeModel, tuning: Tuning, whole: torch.nn.Module, microbatches: int) -> None:
    """Five steps of AdamW make of both adapters, which begin alike, the same one."""
    before = tuning.values()
    optimizer = Optimizer(tuning.trainable, clip_norm=1e9)
    plain_optimizer = torch.optim.AdamW(trainable(whole).values(), lr=1e-2, weight_decay=0.0)
    with stepping(edge, tuning, microbatches) as stepper:
        for step in range(5):
            sequences = ragged_sequences(LENGTHS, seed=step)
            optimizer.step(stepper.gradients(in_microbatches(sequences, microbatches)).by_name, rate=1e-2)
            plain_optimizer.zero_grad()
            plain_loss(whole, sequences).backward()
            plain_optimizer.step()
    assert relative(before, trainable(whole)) > 0.05, "five steps that change nothing compare nothing"
    assert relative(tuning.values(), trainable(whole)) < AFTER_ADAMW


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_five_steps_of_adamw_make_the_adapter_of_one_process(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str, cut: str, microbatches: int
) -> None:
    with connected(servers[family], cut) as edge:
        tuning = attached(edge)
        whole = plain_lora(whole_model(tiny_models[family]), family, adapted_modules(family, cut), tuning.values())
        assert_five_steps_agree(edge, tuning, whole, microbatches)


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "bitfit"), ("llama", "full")])
def test_training_the_ends_own_parameters_equals_one_process(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str, kind: str
) -> None:
    whole = whole_model(tiny_models[family])
    for number in end_blocks("1:1"):
        for name, parameter in whole.get_submodule(f"{BLOCK_LIST[family]}.{number}").named_parameters():
            parameter.requires_grad_(kind == "full" or name.endswith("bias"))
    sequences = ragged_sequences(LENGTHS)
    with connected(servers[family], "1:1") as edge:
        tuning = attached(edge, kind)
        ours, theirs = split_gradients(edge, tuning, sequences, 4), plain_gradients(whole, sequences)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert relative(ours.by_name, theirs.by_name) < EXACT
        optimizer = Optimizer(tuning.trainable, clip_norm=1e9)
        plain_optimizer = torch.optim.AdamW(trainable(whole).values(), lr=1e-3, weight_decay=0.0)
        for name, gradient in theirs.by_name.items():
            trainable(whole)[name].grad = gradient
        optimizer.step(ours.by_name, rate=1e-3)
        plain_optimizer.step()
        assert relative(_without_key_biases(tuning.values()), _without_key_biases(trainable(whole))) < AFTER_ADAMW


def _without_key_biases(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A key bias shifts all of a query's scores alike: its gradient is rounding, of which AdamW makes a whole step."""
    bias = "c_attn.bias"
    return {
        name: torch.cat([value[:HIDDEN], value[2 * HIDDEN :]]) if name.endswith(bias) else value
        for name, value in values.items()
    }


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_local_method_with_the_same_placement_is_that_same_process(
    tiny_models: dict[str, Path], family: str, cut: str
) -> None:
    sequences = ragged_sequences(LENGTHS)
    given = {"method": "local", "data": "unused", "model": str(tiny_models[family]), "cut": cut}
    edge = load_local(TrainConfig.model_validate(given))
    tuning = attached(edge)
    tuning.load(random_values(tuning.trainable))
    whole = plain_lora(whole_model(tiny_models[family]), family, adapted_modules(family, cut), tuning.values())
    assert_same(split_gradients(edge, tuning, sequences, 4), plain_gradients(whole, sequences))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("codec", sorted(LOSSY))
def test_a_lossy_codec_is_applied_to_both_passes_and_stays_within_its_error(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str, codec: str
) -> None:
    sequences = ragged_sequences(LENGTHS)
    least, greatest = LOSSY[codec]
    sent = HIDDEN * (sum(LENGTHS) - len(LENGTHS))  # a row's last token predicts nothing and is not run
    wanted = HIDDEN * sum(sum(sequence.counted) for sequence in sequences)
    for activation, gradient in ((codec, "none"), ("none", codec)):
        ledger = Ledger()
        with connected(servers[family], "2:0", ledger, codec=activation, codec_gradient=gradient) as edge:
            tuning = attached(edge)
            tuning.load(random_values(tuning.trainable))
            ours = split_gradients(edge, tuning, sequences, 1)
        whole = plain_lora(whole_model(tiny_models[family]), family, adapted_modules(family, "2:0"), tuning.values())
        theirs = plain_gradients(whole, sequences)
        assert least < relative(ours.by_name, theirs.by_name) < greatest, (activation, gradient)
        assert (ours.loss == pytest.approx(theirs.loss, rel=1e-6)) == (activation == "none")
        assert ledger.total("train", "up_payload_bytes") == carried(sent, activation) + carried(wanted, gradient)
        assert ledger.total("train", "down_payload_bytes") == carried(wanted, activation) + carried(sent, gradient)


def carried(values: int, codec: str) -> int:
    """Bytes of so many float32 values under a codec."""
    if codec == "int8":
        return values + 2 * -(-values // 64)
    return values * (4 if codec == "none" else 2)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_real_positions_equal_the_whole_models_however_a_batch_is_padded(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str, cut: str, padding: str
) -> None:
    lengths = (9, 9, 9) if padding == "none" else (9, 5, 12)
    ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences(lengths)], left=padding == "left")
    counted_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    whole, real = whole_model(tiny_models[family]), mask_BT.bool()
    with connected(servers[family], cut) as edge, torch.no_grad():
        for given in (
            {"attention_mask": None if padding == "none" else mask_BT},
            {"attention_mask": mask_BT, "position_ids": counted_BT},
            {"attention_mask": mask_BT, "position_ids": counted_BT + 3, "use_cache": False},
        ):
            ours, theirs = edge.model(ids_BT, **given).logits[real], whole(ids_BT, **given).logits[real]
            assert relative({"": ours}, {"": theirs}) < EXACT, list(given)
            assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def hole() -> dict[str, torch.Tensor]:
    return {"attention_mask": torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])}


def empty_row() -> dict[str, torch.Tensor]:
    return {"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}


def four_dimensional() -> dict[str, torch.Tensor]:
    return {"attention_mask": torch.ones(2, 1, 4, 4)}


def jump() -> dict[str, torch.Tensor]:
    return {"position_ids": torch.tensor([[0, 1, 3, 4], [0, 1, 2, 3]])}


def jump_in_a_padded_row() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return {"attention_mask": mask, "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 3, 0]])}


def swap_in_a_padded_row() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return {"attention_mask": mask, "position_ids": torch.tensor([[0, 2, 1, 3], [0, 1, 2, 0]])}


REFUSED = [
    (hole, "padding between its tokens"),
    (empty_row, "a row is empty"),
    (four_dimensional, "2-D attention mask"),
    (jump, "position ids must follow one another"),
    (jump_in_a_padded_row, "position ids must follow one another"),
    (swap_in_a_padded_row, "position ids must follow one another"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_cannot_cross_is_refused_by_name(servers: dict[str, Server], family: str) -> None:
    with connected(servers[family], "1:1") as edge:
        for make, message in REFUSED:
            with pytest.raises(CutError, match=message):
                edge.model(torch.full((2, 4), 7), use_cache=False, **make())
        assert edge.model(torch.full((2, 4), 7)).logits.isfinite().all()
