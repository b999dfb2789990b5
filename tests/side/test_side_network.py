"""A side network is what the papers' equations say, and nothing at all until it is trained."""

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from edge_client.side import Joined, SideShape, attach_side
from isthmus.blocks import find_blocks, watch_owner
from isthmus.cut import Cut
from isthmus.load import load_ends, load_whole
from isthmus.ports import projection, tapped
from tests.conftest import FAMILIES
from tests.parity.reference import BLOCK_LIST, HIDDEN, padded, whole_model
from tests.parity.test_families import FAMILIES as CUTTABLE
from tests.parity.test_families import configuration
from tests.side.ladder import ladder, outputs_of_blocks
from tests.side.network import CUT, SHAPE, WIDTH, Side, attached, moved, token_ids

FINAL_NORM = {"llama": "model.norm", "gpt2": "transformer.ln_f"}
ROWS = [[7, 30, 41, 12, 99, 5, 23], [200, 31, 8], [64, 64, 9, 17, 250]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_the_model_is_the_untouched_one_bit_for_bit(
    tiny_models: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    side, plain = attached(tiny_models[family], dtype=dtype), load_whole(tiny_models[family], dtype)[0]
    assert {parameter.dtype for parameter in side.trained.values()} == {dtype}
    before = plain(input_ids=token_ids(), use_cache=False).logits
    assert torch.equal(side.logits(token_ids()), before)
    assert not torch.equal(moved(side).logits(token_ids()), before)


@pytest.mark.parametrize("family", sorted(CUTTABLE))
def test_every_family_that_can_be_cut_takes_one(family: str) -> None:
    model = AutoModelForCausalLM.from_config(configuration(family)).eval()
    before, found = model(input_ids=token_ids(), use_cache=False).logits, find_blocks(model)
    side = Side(model, found, attach_side(model, found, CUT, SideShape(4, 1, WIDTH), seed=0, here=True))
    assert torch.equal(side.logits(token_ids()), before)
    moved(side).model(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in side.trained.values())


def test_what_a_family_asks_of_its_last_block_is_still_there(tiny_models: dict[str, Path]) -> None:
    class Sliding(nn.Identity):
        attention_type = "sliding_attention"

    joined = attached(tiny_models["llama"]).found.blocks[-1]
    assert isinstance(joined, Joined)
    assert Joined(Sliding(), joined.side).attention_type == "sliding_attention"
    assert not hasattr(Joined(nn.Identity(), joined.side), "attention_type")


@pytest.mark.parametrize(("every", "numbers"), [(2, (1, 3)), (1, (0, 1, 2, 3, 4)), (5, (0,))])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_all_gradients_are_those_of_the_papers_equations(
    tiny_models: dict[str, Path], family: str, every: int, numbers: tuple[int, ...]
) -> None:
    side = moved(attached(tiny_models[family], SideShape(4, every, WIDTH)))
    ids_BT, plain = token_ids(), whole_model(tiny_models[family])
    outputs = outputs_of_blocks(plain, BLOCK_LIST[family], lambda: plain(input_ids=ids_BT, use_cache=False))
    joined_BTD = outputs[-1] + ladder(side.trained, numbers, WIDTH, 1, outputs)
    expected = plain.lm_head(plain.get_submodule(FINAL_NORM[family])(joined_BTD))
    logits = side.model(input_ids=ids_BT, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

    ours, theirs = (
        torch.autograd.grad(cross_entropy(values[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()), parameters)
        for values, parameters in ((logits, list(side.trained.values())), (expected, list(side.trained.values())))
    )
    for name, gradient, reference in zip(side.trained, ours, theirs, strict=True):
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
        assert (gradient - reference).norm() <= 1e-4 * reference.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_reaches_no_parameter_of_the_backbone(tiny_models: dict[str, Path], family: str) -> None:
    side = moved(attached(tiny_models[family]))
    side.model(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
    reached = {id(parameter) for parameter in side.model.parameters() if parameter.grad is not None}
    assert reached == {id(parameter) for parameter in side.trained.values()}


MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]],
    "inside": [[1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 0, 0, 1]],
}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_row_has_the_logits_that_it_has_alone(tiny_models: dict[str, Path], family: str, padding: str) -> None:
    side, ids_BT, mask_BT = moved(attached(tiny_models[family])), token_ids(2, 7), torch.tensor(MASKS[padding])
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    together = side.logits(ids_BT, attention_mask=mask_BT, position_ids=positions_BT)
    for ids_T, real_T, logits_TV in zip(ids_BT, mask_BT.bool(), together, strict=True):
        torch.testing.assert_close(logits_TV[real_T], side.logits(ids_T[real_T][None])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_changes_nothing_before_it(tiny_models: dict[str, Path], family: str) -> None:
    side, ids_BT = moved(attached(tiny_models[family])), token_ids()
    changed_BT = ids_BT.clone()
    changed_BT[:, 5] += 1
    before, after = side.logits(ids_BT), side.logits(changed_BT)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("cut", [Cut(0, 0), Cut(1, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_span_elsewhere_that_delivers_the_taps_makes_no_difference(
    tiny_models: dict[str, Path], family: str, cut: Cut
) -> None:
    class Elsewhere(nn.Module):
        """Runs the span's blocks out of the model's sight."""

        def __init__(self, blocks: Iterable[tuple[int, nn.Module]]) -> None:
            super().__init__()
            self.hidden_blocks = list(blocks)

        def forward(self, hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            for number, block in self.hidden_blocks:
                hidden_BTD = block(hidden_BTD, *args, **kwargs)
                tapped()[number] = hidden_BTD.detach() @ projection(HIDDEN, WIDTH)
            return hidden_BTD

    whole, found = load_whole(tiny_models[family], torch.float32)
    ends, gaps = load_ends(tiny_models[family], cut, torch.float32)
    watch_owner(gaps.owner)
    span = cut.span(len(found.blocks))
    gaps.blocks[cut.bottom] = Elsewhere([(number, deepcopy(found.blocks[number])) for number in span])
    here = moved(Side(whole, found, attach_side(whole, found, cut, SHAPE, seed=0, here=True)))
    there = moved(Side(ends, gaps, attach_side(ends, gaps, cut, SHAPE, seed=0, here=False)))
    ids_BT, mask_BT = padded(ROWS, left=False)
    one, other = (side.logits(ids_BT, attention_mask=mask_BT) for side in (here, there))
    assert torch.equal(one[mask_BT.bool()], other[mask_BT.bool()])
