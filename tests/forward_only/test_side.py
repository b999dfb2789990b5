"""A side network fed over a real server is that side network beside the whole model in one process."""

from pathlib import Path

import pytest
import torch

from edge_client.cached import CachedSpan, Row
from isthmus.ports import projection
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from isthmus.training.optimizer import Optimizer
from tests.conftest import FAMILIES
from tests.forward_only.edges import gradients, local_side, side_edge, stirred
from tests.harness import Server
from tests.parity.reference import BLOCK_LIST, HIDDEN, padded, ragged_sequences, relative, whole_model
from tests.parity.test_training import AFTER_ADAMW, EXACT, assert_same, stepping
from tests.side.ladder import outputs_of_blocks

CUTS = ("0:0", "1:1", "0:2")
LENGTHS = (9, 17, 5, 12, 21, 6, 3)


def sequences(seed: int = 0) -> list[TokenSequence]:
    """Rows of unequal length; two of them are one row again."""
    found = ragged_sequences(LENGTHS, seed)
    return [*found, found[2]]


def in_parts(rows: list[TokenSequence], count: int) -> list[list[TokenSequence]]:
    return [rows[start::count] for start in range(count)]


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_those_of_one_process(
    nodes: dict[str, Server], tiny_models: dict[str, Path], tmp_path: Path, family: str, cut: str, microbatches: int
) -> None:
    parts = in_parts(sequences(), microbatches)
    here, whole = local_side(tiny_models[family], cut)
    stirred(whole)
    theirs = gradients(here, whole, parts)
    with side_edge(nodes[family], cut, tmp_path) as (edge, tuning):
        stirred(tuning)
        for _ in range(2):
            assert_same(gradients(edge, tuning, parts), theirs)


@pytest.mark.parametrize(("family", "cut"), [("llama", "0:0"), ("llama", "1:1"), ("gpt2", "1:1"), ("gpt2", "0:2")])
def test_five_steps_of_adamw_over_two_epochs_make_the_weights_of_one_process(
    nodes: dict[str, Server], tiny_models: dict[str, Path], tmp_path: Path, family: str, cut: str
) -> None:
    here, whole = local_side(tiny_models[family], cut)
    with side_edge(nodes[family], cut, tmp_path) as (edge, tuning):
        before = tuning.values()
        assert all(torch.equal(before[name], value) for name, value in whole.values().items())
        optimizers = [Optimizer(each.trainable, clip_norm=1e9) for each in (tuning, whole)]
        with stepping(edge, tuning, 2) as ours, stepping(here, whole, 2) as theirs:
            for step in range(5):
                batches = [Batch.of(part) for part in in_parts(sequences(step % 3), 2)]
                for stepper, optimizer in zip((ours, theirs), optimizers, strict=True):
                    optimizer.step(stepper.gradients(batches).by_name, 1e-2)
        assert relative(before, tuning.values()) > 0.05, "five steps that change nothing compare nothing"
        assert relative(tuning.values(), whole.values()) < AFTER_ADAMW


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_taps_and_the_output_that_arrive_are_those_of_the_whole_model(
    nodes: dict[str, Server], tiny_models: dict[str, Path], tmp_path: Path, family: str, cut: str
) -> None:
    rows = [sequence.ids for sequence in ragged_sequences((9, 5, 12))]
    model = whole_model(tiny_models[family])
    ids_BT, mask_BT = padded(rows, left=False)
    outputs = outputs_of_blocks(model, BLOCK_LIST[family], lambda: model(ids_BT, attention_mask=mask_BT))
    with side_edge(nodes[family], cut, tmp_path) as (edge, tuning):
        last = edge.cut.span(len(outputs))[-1]
        span = edge.found.blocks[edge.cut.bottom]
        assert isinstance(span, CachedSpan)
        ports = span.ports
        assert tuning.side is not None
        assert [port.block for port in ports] == sorted(range(last - 2, edge.cut.bottom - 1, -2))
        arrived = edge.cached_outputs().of([Row(row) for row in rows])
        for number, (output_ND, taps_NW) in enumerate(arrived):
            whole_ND = outputs[last][number, : len(rows[number])]
            assert relative({"": output_ND}, {"": whole_ND}) < EXACT
            widths = [port.width for port in ports]
            for port, tap_NW in zip(ports, torch.split(taps_NW, widths, -1), strict=True):
                wanted = outputs[port.block][number, : len(rows[number])] @ projection(HIDDEN, port.width)
                assert relative({"": tap_NW}, {"": wanted}) < EXACT, port


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_one_process_however_a_batch_is_padded(
    nodes: dict[str, Server], tiny_models: dict[str, Path], tmp_path: Path, family: str, left: bool
) -> None:
    ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences((9, 5, 12))], left)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    _, whole = local_side(tiny_models[family], "1:1")
    stirred(whole)
    with side_edge(nodes[family], "1:1", tmp_path) as (_, tuning), torch.no_grad():
        stirred(tuning)
        for given in ({}, {"attention_mask": mask_BT}, {"attention_mask": mask_BT, "position_ids": positions_BT + 3}):
            real = mask_BT.bool() if given else torch.ones_like(mask_BT, dtype=torch.bool)
            ours, theirs = (
                model(ids_BT, use_cache=False, **given).logits[real] for model in (tuning.model, whole.model)
            )
            assert relative({"": ours}, {"": theirs}) < EXACT, list(given)
