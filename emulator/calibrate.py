"""Fill an emulator's forms from the model's weights, factors in the metric of the modules' real inputs.

Knows a pair, its linear modules and rows of text; knows no files and no training.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from emulator.costs import Costs
from emulator.measure import batches
from emulator.pair import Pair
from isthmus.emulated.forms import Factored, Quantised, matrix_of
from isthmus.errors import ModelError
from isthmus.linears import Linear, Site, linears_in
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from isthmus.training.progress import Meter, meter

AT_ONCE = 2048
"""Tokens that run through the model at once; a longer row goes alone."""

GRAM_BYTES = 2 << 30
"""Of Gram matrices held at once; a single block may need more."""

DAMPING = 1e-6
"""Of the mean of a Gram matrix's diagonal; ten times as much as often as rounding asks for it."""


@torch.no_grad()
def fill(
    pair: Pair,
    linears: Mapping[Site, Linear],
    rows: Sequence[TokenSequence],
    console: Console,
    costs: Costs | None = None,
) -> None:
    """Fill the forms in a pair's twin: whole numbers by rounding, factors by `factors`, biases as they are.

    Args:
        pair: whose forms are empty.
        linears: the span's linear modules that run once in a pass.
        rows: public text that inputs are taken from; may be empty where the recipe has no ranks.
        console: where progress is shown.
        costs: counts what is spent.

    Raises:
        ModelError: the model's hidden states on this text are not finite.
    """
    sites = {(number, name): linears[number, name] for number in pair.recipe.kept for name in pair.recipe.ranks}
    groups = list(_groups(pair.recipe.kept, sites))
    text = batches(rows, AT_ONCE) if sites else []
    costs = Costs(pair) if costs is None else costs
    whole = len(groups) * len(text) + len(pair.recipe.kept)
    with meter(console, "fill", whole) as progress, costs.stage("build"):
        done = 0
        for group in groups:
            asked = {site: linear for site, linear in sites.items() if site[0] in group}
            with costs.seconds("build", "cloud_forward_s"):
                grams = gram_matrices(pair, asked, text, progress, done)
            _count(costs, text, grams)
            done += len(text)
            for number in group:
                with costs.seconds("build", "cloud_update_s"):
                    _fill_block(pair, number, grams)
                done += 1
                progress.update(done, f"block {number}")
            costs.memory.hold("inputs", 0)


def _count(costs: Costs, text: Sequence[Batch], grams: Mapping[Site, torch.Tensor]) -> None:
    """What Gram matrices took; modules that share their input share one."""
    own = {id(gram_II): gram_II for gram_II in grams.values()}.values()
    costs.memory.hold("inputs", sum(gram_II.nbytes for gram_II in own))
    for batch in text:
        costs.looked_at(batch, tuple(len(gram_II) for gram_II in own))


def gram_matrices(
    pair: Pair, linears: Mapping[Site, Linear], text: Sequence[Batch], progress: Meter, done: int = 0
) -> dict[Site, torch.Tensor]:
    """Sums of x xᵀ over the inputs x of each module at real tokens, float64 [I, I]; who share an input share one.

    Raises:
        ModelError: an input is not finite.
    """
    source = {(number, name): (number, linear.shared[0]) for (number, name), linear in linears.items()}
    grams: dict[Site, torch.Tensor] = {}
    with ExitStack() as hooks:
        real_BT: list[torch.Tensor] = []
        for number, name in dict.fromkeys(source.values()):
            module = pair.found.blocks[number].get_submodule(name)
            handle = module.register_forward_pre_hook(partial(_add, grams, (number, name), real_BT))
            hooks.callback(handle.remove)
        for batch in text:
            mask_BT = batch.attention_mask_BT.to(pair.model.device)
            real_BT[:] = [mask_BT.bool()]
            pair.model.base_model(
                input_ids=batch.input_ids_BT.to(pair.model.device), attention_mask=mask_BT, use_cache=False
            )
            done += 1
            progress.update(done, "inputs")
    for (number, name), gram_II in grams.items():
        if not gram_II.isfinite().all():
            raise ModelError(f"block {number} gives {name} inputs that are not finite; check the model's weights")
    return {site: grams[first] for site, first in source.items()}


def factors(weight_OI: torch.Tensor, gram_II: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two thin matrices whose product's outputs are nearest to a matrix's own on the inputs of a Gram matrix.

    Truncation-aware whitening (SVD-LLM, Wang et al., 2024): with L Lᵀ the Gram matrix, W L ≈ U_k S_k V_kᵀ, hence
    W ≈ U_k S_k V_kᵀ L⁻¹, which is U_k U_kᵀ W, so nothing is inverted. Each factor takes the root of S_k.

    Returns:
        `down` [rank, I] and `up` [O, rank], in float64.
    """
    weight_OI = weight_OI.double()
    u_OR, s_R, _ = torch.linalg.svd(weight_OI @ _root(gram_II.double()), full_matrices=False)
    u_OR = u_OR[:, :rank]
    root_R = s_R[:rank].clamp_min(max(float(s_R[0]) * torch.finfo(s_R.dtype).eps, torch.finfo(s_R.dtype).tiny)).sqrt()
    return (u_OR.T @ weight_OI) / root_R[:, None], u_OR * root_R


def _root(gram_II: torch.Tensor) -> torch.Tensor:
    """The lower triangular root of a Gram matrix, damped so that there is one."""
    step = float(gram_II.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)) * DAMPING
    while True:
        root_II: torch.Tensor
        root_II, failed = torch.linalg.cholesky_ex(gram_II + step * torch.eye(len(gram_II), dtype=gram_II.dtype))
        if not failed:
            return root_II
        step *= 10


def _add(
    grams: dict[Site, torch.Tensor], site: Site, real_BT: list[torch.Tensor], _: nn.Module, args: tuple[Any, ...]
) -> None:
    """Add a batch's inputs to a module's Gram matrix: products in float32, which is as exact as the inputs."""
    input_NI = args[0].flatten(0, -2)[real_BT[0].flatten()].float()
    product_II = (input_NI.T @ input_NI).double().cpu()
    grams[site] = grams[site].add_(product_II) if site in grams else product_II


def _groups(numbers: Sequence[int], sites: Mapping[Site, Linear]) -> Iterator[list[int]]:
    """Blocks whose Gram matrices are held together, in order."""
    group: list[int] = []
    held = 0
    for number in numbers:
        mine = {linear.shared[0]: linear.inputs for (block, _), linear in sites.items() if block == number}
        size = sum(8 * inputs**2 for inputs in mine.values())
        if group and held + size > GRAM_BYTES:
            yield group
            group, held = [], 0
        group.append(number)
        held += size
    yield group


def _fill_block(pair: Pair, number: int, grams: dict[Site, torch.Tensor]) -> None:
    for name, module in linears_in(pair.found.blocks[number]).items():
        form = pair.twin_found.blocks[number].get_submodule(name)
        if isinstance(form, Factored):
            down_RI, up_OR = factors(matrix_of(module).cpu(), grams.pop((number, name)), form.down.out_features)
            _put(form.down, down_RI)
            _put(form.up, up_OR)
        elif isinstance(form, Quantised):
            form.fill(matrix_of(module))
        if isinstance(form, Factored | Quantised) and form.bias is not None:
            form.bias.copy_(module.bias)  # type: ignore[arg-type]


def _put(thin: nn.Linear, weight_OI: torch.Tensor) -> None:
    weight_OI = weight_OI.to(thin.weight.device, torch.float32)
    if isinstance(thin, Quantised):
        thin.fill(weight_OI)
    else:
        thin.weight.copy_(weight_OI)
