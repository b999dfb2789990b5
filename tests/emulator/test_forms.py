"""Lossy forms are linear modules: as near to their matrix as their size allows, exact in what they promise."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from edge_client.config import TrainConfig
from edge_client.importances import importances
from isthmus.emulated.forms import GROUP, Bits, Factored, Quantised, form_of, matrix_of, shape_of
from isthmus.emulated.recipe import MAX_BYTES, Distance, Emulator
from isthmus.errors import BundleError, UsageError
from isthmus.ledger.record import Ledger
from tests.emulator.conftest import BLOCKS, CUT, QUIET, Make

ATTENTION = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
PROJECTIONS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
RECIPE: dict[str, Any] = {"method": "drop", "cut": "1:1", "blocks": [1, None, 3]}
ABOUT: dict[str, Any] = {
    "recipe": RECIPE,
    "parameters": 10,
    "span_parameters": 20,
    "weight_bytes": 40,
    "flops_per_token": 80,
    "span_flops_per_token": 160,
}
DISTANCE = {"text": "0" * 64, "rows": 2, "tokens": 9, "hidden": 0.5, "loss": 2.5, "loss_of_span": 2.0}


def matrix(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def quantised(weight_OI: torch.Tensor, bits: Bits, bias: bool = False) -> Quantised:
    form = Quantised(weight_OI.shape[1], weight_OI.shape[0], bias, bits)
    form.fill(weight_OI)
    return form


@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from([4, 8]), st.integers(0, 99))
def test_a_quantised_weight_is_within_half_a_step_of_its_own(outputs: int, inputs: int, bits: Bits, seed: int) -> None:
    weight_OI = matrix(outputs, inputs, seed)
    found_OI = quantised(weight_OI, bits).weight
    assert found_OI.shape == weight_OI.shape
    for start in range(0, inputs, GROUP):
        one_OG, other_OG = weight_OI[:, start : start + GROUP], found_OI[:, start : start + GROUP]
        step_O = one_OG.abs().amax(1) / ((1 << (bits - 1)) - 1)
        assert ((one_OG - other_OG).abs().amax(1) <= step_O * 0.5001).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_numbers_of_a_scale_come_back_exactly_and_again(bits: Bits) -> None:
    half = (1 << (bits - 1)) - 1
    weight_OI = torch.randint(-half, half + 1, (5, 130), generator=torch.Generator().manual_seed(0)).float() / 8
    weight_OI[:, ::GROUP] = half / 8
    form = quantised(weight_OI, bits)
    assert torch.equal(form.weight, weight_OI)
    assert torch.equal(quantised(form.weight, bits).codes, form.codes)
    assert form.codes.nbytes == 5 * 3 * GROUP * bits // 8


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_zeros_and_of_tiny_weights_stay_finite(bits: Bits) -> None:
    weight_OI = torch.cat([torch.zeros(2, GROUP), torch.full((2, GROUP), 1e-44), matrix(2, GROUP)], 1)
    found_OI = quantised(weight_OI, bits).weight
    assert found_OI.isfinite().all()
    assert not found_OI[:, :GROUP].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_product_and_its_gradients_are_those_of_the_dense_matrix(bits: Bits) -> None:
    form = quantised(matrix(6, 100), bits, bias=True)
    form.scale.requires_grad_(True)
    input_BTI = torch.randn(2, 3, 100, requires_grad=True)
    form(input_BTI).square().sum().backward()
    ours = [input_BTI.grad, form.scale.grad]
    input_BTI.grad = form.scale.grad = None
    # The same product out of operations that autograd knows.
    nibbles = torch.stack((form.codes & 15, form.codes >> 4), -1).flatten(1) if bits == 4 else form.codes
    whole_OGW = (nibbles.float() - (1 << (bits - 1))).reshape(6, -1, GROUP)
    dense_OI = (whole_OGW * form.scale[..., None]).flatten(1)[:, :100]
    (linear(input_BTI, dense_OI) + form.bias).square().sum().backward()
    for mine, theirs in zip(ours, (input_BTI.grad, form.scale.grad), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_quantised_product_keeps_no_input_where_only_the_input_needs_a_gradient() -> None:
    form = quantised(matrix(6, 100), 4).requires_grad_(False)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda it: it):
        form(torch.randn(2, 100, requires_grad=True))
    assert sorted(kept) == sorted([form.codes.shape, form.scale.shape])


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_factors_are_their_product(bits: Bits | None) -> None:
    form = Factored(20, 30, True, 7, bits).requires_grad_(False)
    for thin in (form.down, form.up):
        thin.fill(matrix(*thin.weight.shape)) if isinstance(thin, Quantised) else nn.init.normal_(thin.weight)
    nn.init.normal_(form.bias)
    input_NI = torch.randn(4, 20)
    torch.testing.assert_close(form(input_NI), linear(input_NI, form.weight, form.bias), rtol=1e-4, atol=1e-5)
    assert form.weight.shape == (30, 20)


def test_both_kinds_of_linear_module_are_read_the_same_way_round() -> None:
    plain, turned = nn.Linear(20, 30, bias=False), Conv1D(30, 20)
    assert shape_of(plain) == (20, 30, False)
    assert shape_of(turned) == (20, 30, True)
    input_NI = torch.randn(4, 20)
    for module in (plain, turned):
        torch.testing.assert_close(linear(input_NI, matrix_of(module), module.bias), module(input_NI))


@pytest.mark.parametrize("make", [lambda: nn.Linear(20, 30), lambda: Conv1D(30, 20)])
def test_a_form_has_the_module_s_place_type_and_bias_and_is_frozen(make: Any) -> None:
    module = make().to(torch.bfloat16).to("meta")
    assert form_of(module, None, None) is module
    for rank, bits in ((3, None), (None, 4), (3, 8)):
        form = form_of(module, rank, bits)  # type: ignore[arg-type]
        assert isinstance(form, nn.Linear)
        assert (form.in_features, form.out_features, form.bias.shape) == (20, 30, (30,))
        assert {one.dtype for one in form.parameters()} == {torch.bfloat16}
        assert {one.device.type for one in form.state_dict().values()} == {"meta"}
        assert not any(one.requires_grad for one in form.parameters())
        assert "weight" not in form.state_dict()


def test_a_recipe_and_its_figures_come_back_from_their_file(tmp_path: Path) -> None:
    about = Emulator.parse(json.dumps({**ABOUT, "distance": DISTANCE}))
    about.save(tmp_path)
    assert Emulator.load(tmp_path) == about
    assert about.recipe.kept == (1, 3)
    assert about.distance is not None
    assert about.distance.gap == 0.5
    assert Distance(**{**DISTANCE, "loss": 1.5}).gap == -0.5


def test_the_same_facts_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Emulator.parse(json.dumps(ABOUT)).save(tmp_path / name)
    assert (tmp_path / "one" / "emulator.json").read_bytes() == (tmp_path / "two" / "emulator.json").read_bytes()


@pytest.mark.parametrize(
    ("recipe", "others", "message"),
    [
        ({"method": "prune"}, {}, "recipe.method"),
        ({"cut": "1-1"}, {}, "recipe.cut"),
        ({"blocks": []}, {}, "recipe.blocks"),
        ({"blocks": [None, None]}, {}, "nothing stands anywhere"),
        ({"blocks": [2, None]}, {}, "block 2 is used and does not stand at its own place"),
        ({"blocks": [1, 7]}, {}, "block 7 is used"),
        ({"blocks": [0, 2]}, {}, "block 0 is used"),
        ({"blocks": [-1]}, {}, "recipe.blocks"),
        ({"blocks": ["1"]}, {}, "recipe.blocks"),
        ({"ranks": {"mlp.up": 0}}, {}, "recipe.ranks"),
        ({"ranks": {"../up": 4}}, {}, "recipe.ranks"),
        ({"bits": 3}, {}, "recipe.bits"),
        ({"more": 1}, {}, "recipe.more"),
        ({}, {"parameters": 0}, "parameters"),
        ({}, {"parameters": 1e400}, "parameters"),
        ({}, {"distance": {**DISTANCE, "hidden": float("nan")}}, "distance.hidden"),
        ({}, {"distance": {**DISTANCE, "text": "x"}}, "distance.text"),
        ({}, {"format": "isthmus-emulator/2"}, "format"),
    ],
)
def test_a_malformed_recipe_is_refused_and_the_field_named(
    recipe: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        Emulator.parse(json.dumps({**ABOUT, "recipe": {**RECIPE, **recipe}, **others}))


def test_a_file_that_is_none_or_too_long_or_absent_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\xff", b"[]", b"{" * 100_000):
        with pytest.raises(BundleError, match=r"emulator.json is malformed"):
            Emulator.parse(content)
    with pytest.raises(BundleError, match="is over"):
        Emulator.parse(b" " * (MAX_BYTES + 1))
    with pytest.raises(BundleError, match=r"cannot be read .* name an emulator"):
        Emulator.load(tmp_path)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"]], ids=str)
def test_an_adapter_stands_around_both_factors_and_has_an_importance(
    targets: list[str], bits: Bits | None, make: Make, rows: Path, tmp_path: Path
) -> None:
    make(tmp_path / "thin", method="rank", keep=0.5, bits=bits)
    given = {"emulator": str(tmp_path / "thin"), "targets": targets, "steps": 1, "rank": 2}
    config = TrainConfig.model_validate({"method": "offsite", "data": rows, **given})
    found = importances(config, Ledger(), QUIET)
    known = PROJECTIONS if targets == ["all-linear"] else ("self_attn.q_proj", "self_attn.v_proj")
    assert found.keys() == {f"{number}.{name}" for number in CUT.span(BLOCKS) for name in known}
    assert min(found.values()) > 0
    wrong = TrainConfig.model_validate({"method": "offsite", "data": rows, **given, "targets": ["down"]})
    with pytest.raises(UsageError, match=r"'down' is no linear module .* known are all-linear, down_proj, gate_proj"):
        importances(wrong, Ledger(), QUIET)
