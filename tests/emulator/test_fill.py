"""Factors are the best of their size on the real inputs of public text, and filling changes nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import emulator.build
import emulator.calibrate
from emulator.calibrate import AT_ONCE, factors, gram_matrices
from emulator.measure import batches, measure
from emulator.text import read_text
from isthmus.emulated.forms import Factored, Quantised, matrix_of
from isthmus.emulated.load import repeat_blocks
from isthmus.errors import ModelError
from isthmus.linears import linears_in, linears_of
from isthmus.load import load_whole, outline
from isthmus.training.progress import Meter
from tests.emulator.conftest import QUIET, filled, logits
from tests.harness import save_tiny_model


def error_on(inputs_NI: torch.Tensor, weight_OI: torch.Tensor, down_RI: torch.Tensor, up_OR: torch.Tensor) -> float:
    return float((inputs_NI @ (weight_OI - up_OR @ down_RI).T).square().sum())


def test_factors_are_the_best_of_their_rank_on_the_given_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    inputs_NI = torch.randn(90, 20, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 20)
    down_RI, up_OR = factors(weight_OI, inputs_NI.T @ inputs_NI, 5)
    least = torch.linalg.svdvals(inputs_NI @ weight_OI.T)[5:].square().sum()  # Eckart and Young
    assert error_on(inputs_NI, weight_OI, down_RI, up_OR) == pytest.approx(float(least), rel=1e-4)
    plain = factors(weight_OI, torch.eye(20), 5)
    assert error_on(inputs_NI, weight_OI, *plain) > 1.2 * float(least)


def test_factors_share_the_singular_values_between_them() -> None:
    weight_OI = torch.randn(12, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    down_RI, up_OR = factors(weight_OI, torch.eye(20), 4)
    torch.testing.assert_close(down_RI.norm(dim=1), up_OR.norm(dim=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("inputs", [torch.zeros(9, 8), torch.ones(9, 8), 1e-18 * torch.eye(8), 1e12 * torch.eye(8)[:2]])
def test_inputs_that_say_nothing_about_some_direction_still_give_factors(inputs: torch.Tensor) -> None:
    weight_OI = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    down_RI, up_OR = factors(weight_OI, inputs.T @ inputs, 6)
    torch.testing.assert_close(up_OR @ down_RI, weight_OI.double(), rtol=1e-4, atol=1e-6)
    down_RI, up_OR = factors(torch.zeros(6, 8), inputs.T @ inputs, 2)
    assert not (up_OR @ down_RI).any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_whitened_factors_give_nearer_outputs_on_real_inputs_than_plain_ones(
    family: str, homes: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = read_text(text, homes[family], 48)
    pair = filled(homes[family], text, method="rank", keep=0.4)
    whitened = measure(pair, public.held_out, public.digest, QUIET)
    monkeypatch.setattr(emulator.calibrate, "factors", lambda w, gram, rank: factors(w, torch.eye(len(gram)), rank))
    plain = measure(filled(homes[family], text, method="rank", keep=0.4), public.held_out, public.digest, QUIET)
    assert whitened.hidden < 0.8 * plain.hidden


def test_gram_matrices_are_of_the_real_tokens_inputs_alone(homes: dict[str, Path], text: Path) -> None:
    directory = homes["gpt2"]
    model, found = outline(directory)
    linears = linears_of(model, found, range(2, 4))
    pair = filled(directory, text, method="drop", keep=4)
    rows = [
        replace(row, ids=row.ids[:length], counted=row.counted[:length])
        for row, length in zip(read_text(text, directory, 48).rows, (9, 30, 17), strict=False)
    ]
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        pair.found.blocks[3]
        .get_submodule(name)
        .register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2)))
        for name in linears_in(pair.found.blocks[3])
    ]
    with torch.no_grad():
        for row in rows:
            pair.model.base_model(input_ids=torch.tensor([row.ids[:-1]]))
        for hook in hooks:
            hook.remove()
        grams = gram_matrices(pair, linears, batches(rows, AT_ONCE), Meter(QUIET, "", 1, None))
    assert grams.keys() == linears.keys()
    for name, inputs in seen.items():
        each = torch.cat(inputs).double()
        torch.testing.assert_close(grams[3, name], each.T @ each, rtol=1e-4, atol=1e-4)


def test_little_memory_for_gram_matrices_makes_more_passes_and_the_same_factors(
    homes: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ample = filled(homes["llama"], text, method="rank", keep=0.5).twin.state_dict()
    passes: list[int] = []

    def noted(pair: Any, linears: Any, *rest: Any) -> Any:
        passes.append(len({number for number, _ in linears}))
        return gram_matrices(pair, linears, *rest)

    monkeypatch.setattr(emulator.calibrate, "gram_matrices", noted)
    monkeypatch.setattr(emulator.calibrate, "GRAM_BYTES", 8 * (3 * 32**2 + 64**2) * 3)
    scarce = filled(homes["llama"], text, method="rank", keep=0.5).twin.state_dict()
    assert passes == [3, 1]
    assert all(torch.equal(scarce[name], ample[name]) for name in ample)


def test_bits_on_top_of_ranks_quantise_the_factors(homes: dict[str, Path], text: Path) -> None:
    pair = filled(homes["gpt2"], text, method="rank", keep=0.9, bits=8)
    plain = filled(homes["gpt2"], text, method="rank", keep=0.9)
    for name, module in linears_in(pair.found.blocks[2]).items():
        form, exact = (each.twin_found.blocks[2].get_submodule(name) for each in (pair, plain))
        assert isinstance(form, Factored)
        assert isinstance(form.down, Quantised)
        assert isinstance(form.up, Quantised)
        for thin, other in ((form.down, exact.down), (form.up, exact.up)):
            torch.testing.assert_close(thin.weight, other.weight, rtol=0, atol=float(other.weight.abs().max()) / 200)
        assert torch.equal(form.bias, module.bias)
        assert not torch.equal(form.dense(), matrix_of(module))


def test_a_model_with_weights_that_are_not_finite_is_refused(text: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"block 2 gives self_attn.q_proj inputs that are not finite"):
        filled(tmp_path / "model", text, method="rank", keep=0.5)


def test_filling_leaves_the_model_as_it_was(homes: dict[str, Path], text: Path) -> None:
    before = logits(load_whole(homes["llama"], torch.float32)[0])
    pair = filled(homes["llama"], text, method="rank", keep=0.3, bits=4)
    repeat_blocks(pair.twin_found, pair.recipe, pair.repeated)
    assert torch.equal(logits(pair.model), before)
    assert not any(module._forward_pre_hooks for block in pair.found.blocks for module in block.modules())
