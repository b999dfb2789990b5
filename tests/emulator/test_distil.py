"""Distillation: it brings an emulator nearer to its span, touches nothing else, and resumes bit by bit."""

import io
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from emulator import distil as module_under_test
from emulator.distil import DistilPlan, distil
from emulator.measure import measure
from emulator.pair import Pair
from emulator.trained import TrainedWeights
from isthmus.emulated.forms import Factored, Quantised, matrix_of
from isthmus.emulated.load import repeat_blocks
from isthmus.emulated.recipe import CurvePoint, Distance, Method, Recipe
from isthmus.errors import InterruptedRunError, ModelError, RunError, UsageError
from isthmus.linears import linears_in
from isthmus.load import load_whole
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from isthmus.training.optimizer import rate_at
from tests.conftest import FAMILIES

METHODS = ("drop", "share", "rank", "quant")
BLOCKS: dict[Method, tuple[int | None, ...]] = {
    "drop": (1, None, None, 4),
    "share": (1, 1, 4, 4),
    "rank": (1, 2, 3, 4),
    "quant": (1, 2, 3, 4),
}
PLAN = DistilPlan(steps=24, batch_size=8, lr=3e-3, warmup_steps=2, seed=0)
SHORT = replace(PLAN, steps=7, batch_size=4)


def text(seed: int, count: int = 32) -> list[TokenSequence]:
    """Rows in which each letter follows from the one before it, of differing lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        start, length = (int(torch.randint(low, 20, (1,), generator=generator)) for low in (0, 6))
        ids = tuple(10 + (start + 3 * place) % 20 for place in range(length))
        rows.append(TokenSequence(ids, (False, *[True] * (length - 1))))
    return rows


ROWS, HELD_OUT = text(1), text(2, 16)


def recipe_of(method: Method, model: Path) -> Recipe:
    ranks: dict[str, int] = {}
    if method == "rank":
        _, found = load_whole(model, torch.float32)
        ranks = dict.fromkeys(linears_in(found.blocks[1]), 8)
    return Recipe(method=method, cut="1:1", blocks=BLOCKS[method], ranks=ranks, bits=4 if method == "quant" else None)


def fill(form: nn.Module, module: nn.Module) -> None:
    """The plainest filling: rounded, or the greatest singular values."""
    weight_OI = matrix_of(module).detach()
    if isinstance(form, Quantised):
        form.fill(weight_OI)
    elif isinstance(form, Factored):
        left_OR, values_R, right_RI = torch.linalg.svd(weight_OI, full_matrices=False)
        rank = len(form.down.weight)
        form.up.weight.data = left_OR[:, :rank] * values_R[:rank].sqrt()
        form.down.weight.data = values_R[:rank, None].sqrt() * right_RI[:rank]
    if form.bias is not None:
        form.bias.data = module.bias.detach().clone()  # type: ignore[union-attr]


def built(method: Method, model: Path) -> Pair:
    """A pair whose emulator is filled; repeated blocks stand in it."""
    pair = Pair.of(*load_whole(model, torch.float32), recipe_of(method, model))
    for number in pair.recipe.kept if method in ("rank", "quant") else ():
        forms = linears_in(pair.twin_found.blocks[number])
        for name, module in linears_in(pair.found.blocks[number]).items():
            fill(forms[name], module)
    repeat_blocks(pair.twin_found, pair.recipe, pair.repeated)
    return pair


def distance(pair: Pair) -> Distance:
    return measure(pair, HELD_OUT, "0" * 64, Console(quiet=True))


def run(
    pair: Pair,
    checkpoints: Path,
    plan: DistilPlan = SHORT,
    resume: bool = False,
    rows: list[TokenSequence] = ROWS,
    console: Console | None = None,
    measure: Callable[[], Distance] | None = None,
) -> tuple[CurvePoint, ...]:
    console = console or Console(file=io.StringIO())
    return distil(pair, rows, plan, checkpoints, resume, console, measure or (lambda: distance(pair)))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def signalled_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Send this process a SIGINT in the middle of a pair's `call`th comparison with gradients."""
    calls: list[int] = []
    compare = Pair.compare

    def interrupted(self: Pair, batch: Batch, both_losses: bool = False) -> object:
        calls.append(torch.is_grad_enabled())
        if torch.is_grad_enabled() and sum(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return compare(self, batch, both_losses)

    monkeypatch.setattr(Pair, "compare", interrupted)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    return tiny_models[request.param]


@pytest.mark.parametrize("method", METHODS)
def test_distillation_lowers_the_held_out_distance_and_changes_nothing_but_the_emulator(
    method: Method, model: Path, tmp_path: Path
) -> None:
    pair = built(method, model)
    teacher, before, twin = state_of(pair.model), distance(pair), state_of(pair.twin)
    curve = run(pair, tmp_path, PLAN)
    after = distance(pair)
    assert after.hidden < 0.8 * before.hidden
    assert after.loss_of_span == before.loss_of_span
    assert (curve[0].held_out, curve[-1].held_out) == (before.hidden, after.hidden)
    assert same(state_of(pair.model), teacher)
    kept = tuple(f"{pair.found.path}.{number}." for number, source in enumerate(pair.recipe.blocks, 1) if source)
    changed = {name for name, tensor in pair.twin.state_dict().items() if not torch.equal(tensor, twin[name])}
    assert changed == {name for name in twin if name.startswith(kept) and not name.endswith(".codes")}


@pytest.mark.parametrize("method", METHODS)
def test_the_model_and_its_emulator_share_no_parameter_but_those_of_the_ends(
    method: Method, model: Path, tmp_path: Path
) -> None:
    pair = built(method, model)
    run(pair, tmp_path, replace(SHORT, steps=1))
    theirs = {id(parameter) for parameter in pair.model.parameters()}
    span, ends = pair.cut.span(6), pair.cut.ends(6)
    assert not any(
        id(parameter) in theirs for number in span for parameter in pair.twin_found.blocks[number].parameters()
    )
    assert all(id(parameter) in theirs for number in ends for parameter in pair.twin_found.blocks[number].parameters())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in pair.twin.parameters())


@pytest.mark.parametrize("put_in_before", [True, False])
def test_repeated_blocks_train_the_one_weight(model: Path, tmp_path: Path, put_in_before: bool) -> None:
    pair = Pair.of(*load_whole(model, torch.float32), recipe_of("share", model))
    if put_in_before:
        repeat_blocks(pair.twin_found, pair.recipe, pair.repeated)
    run(pair, tmp_path / "one")
    for number, source in ((2, 1), (3, 4)):
        theirs = dict(pair.twin_found.blocks[source].named_parameters())
        assert all(theirs[name] is mine for name, mine in pair.twin_found.blocks[number].named_parameters())
        assert pair.twin_found.blocks[number] is pair.repeated[number]
    other = built("share", model)
    run(other, tmp_path / "other")
    assert same(state_of(pair.twin), state_of(other.twin))


@pytest.mark.parametrize("method", METHODS)
def test_a_distillation_that_was_stopped_goes_on_bit_by_bit_as_if_it_never_was(
    method: Method, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = built(method, model)
    curve = run(straight, tmp_path / "straight")
    stopped = built(method, model)
    with monkeypatch.context() as patch:
        signalled_at(patch, 3)
        with pytest.raises(InterruptedRunError, match=r"after step 3 .* --resume"):
            run(stopped, tmp_path / "stopped")
    assert [path.name[:13] for path in (tmp_path / "stopped").iterdir() if "00003" in path.name] == ["step-00000003"]
    resumed = built(method, model)
    assert run(resumed, tmp_path / "stopped", resume=True) == curve
    assert same(state_of(resumed.twin), state_of(straight.twin))


def test_a_distillation_that_crashed_goes_on_from_its_last_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(module_under_test, "POINTS", 3)  # so that the checkpoint lies between two points
    straight, crashing, resumed = (built("quant", model) for _ in range(3))
    curve = run(straight, tmp_path / "straight")
    measured: list[int] = []

    def fails_in_the_end() -> Distance:
        measured.append(1)
        if len(measured) == 3:
            raise MemoryError
        return distance(crashing)

    with pytest.raises(MemoryError):
        run(crashing, tmp_path / "crashed", measure=fails_in_the_end)
    assert run(resumed, tmp_path / "crashed", resume=True) == curve
    assert same(state_of(resumed.twin), state_of(straight.twin))


def test_a_finished_distillation_resumes_to_its_end_without_a_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = built("drop", model), built("drop", model)
    curve = run(first, tmp_path)
    monkeypatch.delattr(Pair, "compare")
    assert run(again, tmp_path, resume=True) == curve
    assert same(state_of(again.twin), state_of(first.twin))


def test_to_resume_where_nothing_is_begins_and_not_to_resume_begins_anew(model: Path, tmp_path: Path) -> None:
    pairs = [built("drop", model) for _ in range(2)]
    curves = [run(pair, tmp_path, resume=resume) for pair, resume in zip(pairs, (True, False), strict=True)]
    assert curves[0] == curves[1]
    assert same(state_of(pairs[0].twin), state_of(pairs[1].twin))


def test_a_resumption_with_another_text_plan_recipe_model_or_rounding_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny_models["llama"]
    run(built("quant", model), tmp_path)
    with pytest.raises(RunError, match="the text is not"):
        run(built("quant", model), tmp_path, resume=True, rows=ROWS[::-1])
    with pytest.raises(RunError, match="the plan is not"):
        run(built("quant", model), tmp_path, replace(SHORT, lr=1e-3), resume=True)
    with pytest.raises(RunError, match="the recipe is not"):
        run(built("drop", model), tmp_path, resume=True)
    changed = built("quant", model)
    changed.model.get_input_embeddings().weight.data[0, 0] += 1
    with pytest.raises(RunError, match="the model is not"):
        run(changed, tmp_path, resume=True)
    rounded = built("quant", model)
    next(tensor for tensor in rounded.twin_found.blocks[1].buffers() if tensor.dtype == torch.uint8)[0, 0] ^= 1
    with pytest.raises(RunError, match=r"rounding .* is not"):
        run(rounded, tmp_path, resume=True)


def test_a_step_moves_no_weight_further_than_its_rate(model: Path, tmp_path: Path) -> None:
    pair = built("quant", model)
    forms = [module for module in pair.twin.modules() if isinstance(module, Quantised)]
    before = [form.weight.clone() for form in forms]
    run(pair, tmp_path, replace(SHORT, steps=1, warmup_steps=0, lr=1e-3))
    moved = max(float((form.weight - old).abs().max()) for form, old in zip(forms, before, strict=True))
    assert 0.5e-3 < moved < 1.001e-3


def test_the_gradient_that_is_clipped_is_that_of_greatest_weights_not_of_their_scales(model: Path) -> None:
    weights = TrainedWeights(pair := built("quant", model))
    scales = [module.scale for module in pair.twin.modules() if isinstance(module, Quantised)]
    with weights.training():
        norm = weights.step(weights.gradients(torch.cat([scale.flatten() for scale in scales]).sum()), 1e-3)
    assert norm == pytest.approx(sum(scale.numel() for scale in scales) ** 0.5 / 8)


def test_each_step_goes_down_thirty_times_the_distance_plus_the_loss_of_a_token(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aims: list[float] = []
    rates: list[float] = []

    aimed = TrainedWeights.gradients

    def aims_at(weights: TrainedWeights, aim: torch.Tensor) -> dict[str, torch.Tensor]:
        aims.append(float(aim.detach()))
        return aimed(weights, aim)

    def stands_still(_: TrainedWeights, __: dict[str, torch.Tensor], rate: float) -> float:
        rates.append(rate)
        return 0.0

    monkeypatch.setattr(TrainedWeights, "gradients", aims_at)
    monkeypatch.setattr(TrainedWeights, "step", stands_still)
    curve = run(built("drop", model), tmp_path)
    assert aims == pytest.approx([30 * point.hidden + point.loss for point in curve[1:]])
    assert (curve[0].loss, curve[0].hidden) == (curve[1].loss, curve[1].hidden)  # of the first batch, before it
    assert rates == [rate_at(step, SHORT.steps, SHORT.lr, "cosine", SHORT.warmup_steps) for step in range(SHORT.steps)]


def test_a_gradient_that_is_not_finite_ends_it_before_a_checkpoint_has_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedWeights, "step", lambda *_: float("inf"))
    with pytest.raises(ModelError, match="lower --lr"):
        run(built("drop", model), tmp_path)
    assert [path.name[:13] for path in tmp_path.iterdir()] == ["step-00000000"]


@pytest.mark.parametrize(
    ("steps", "found"), [(1, "held-out rows is nan .*less --lr"), (7, "loss is nan after 1 steps .*lower --lr")]
)
def test_a_loss_that_is_not_finite_ends_it_with_what_to_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, found: str
) -> None:
    monkeypatch.setattr(module_under_test, "HELD_OUT_POINTS", 2)
    with pytest.raises(ModelError, match=found):
        run(built("drop", model), tmp_path, replace(SHORT, steps=steps, lr=1e30, warmup_steps=0))


def test_an_emulator_that_is_broken_from_the_start_is_not_blamed_on_the_rate(model: Path, tmp_path: Path) -> None:
    pair = built("rank", model)
    next(module for module in pair.twin.modules() if isinstance(module, Factored)).up.weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"after 0 steps .*more ranks"):
        run(pair, tmp_path)


@pytest.mark.parametrize("steps", [1, 3, 120])
def test_the_curve_has_few_points_from_first_to_last_and_measures_at_fewer(
    steps: int, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    pair = built("drop", tiny_models["llama"])
    curve = run(pair, tmp_path, replace(SHORT, steps=steps, batch_size=1), rows=ROWS[:2])
    assert [curve[0].step, curve[-1].step] == [0, steps]
    gaps = {later.step - point.step for point, later in pairwise(curve)}
    assert max(gaps) - min(gaps) <= 1
    assert len(curve) == min(50, steps + 1)
    assert sum(point.held_out is not None for point in curve) == min(5, steps + 1)
    assert None not in (curve[0].held_out, curve[-1].held_out)


def test_progress_shows_the_loss_and_the_distance(model: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    run(built("drop", model), tmp_path, console=Console(file=shown, width=200))
    assert "distil" in shown.getvalue()
    assert "7/7  loss " in shown.getvalue()
    assert re.search(r"distance 0\.\d{4}  of the training batch", shown.getvalue())


def test_a_plan_or_a_text_that_makes_no_sense_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    for wrong in (
        {"steps": 0},
        {"batch_size": 0},
        {"warmup_steps": -1},
        {"seed": -1},
        {"lr": 0.0},
        {"lr": float("nan")},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            replace(PLAN, **wrong)
    with pytest.raises(UsageError, match="no rows"):
        run(built("drop", tiny_models["llama"]), tmp_path, rows=[])
