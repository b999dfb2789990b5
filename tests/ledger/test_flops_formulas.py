"""The ledger's FLOPs of whole runs are those of closed formulas, on both sides, for each method.

Formulas count two FLOPs per multiply-add; they know shapes and no module. T tokens of a row, D hidden size, V
vocabulary, R rank of LoRA, W values of a tap, S size of the side network. All rows are as long, and all carry loss.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from emulator.build import Plan, build
from isthmus.cut import Cut
from isthmus.emulated.recipe import Emulator
from isthmus.report.schema import RunReport
from tests.faults.training import run_here, settings
from tests.harness import Server
from tests.parity.test_flops import LLAMA, edge_formula, span_formula

D, R, V = 32, 4, 259
W, S, TAPS = 24, 8, 3
ROWS, BATCH, EPOCHS, LETTERS = 8, 4, 2, 40
SPAN = 4
STEPS = EPOCHS * ROWS // BATCH
WITHIN = 0.01
QUIET = Console(file=io.StringIO())
LORA = {"rank": R, "alpha": 8.0, "steps": STEPS, "batch_size": BATCH}
SIDE = {"method": "side", "rank": None, "alpha": None, "reduction": 4, "tap_every": 1, "tap_width": W}
SIZES = {**LLAMA.before, **dict(zip(("o_proj", "gate_proj", "up_proj", "down_proj"), LLAMA.behind, strict=True))}

Passes = tuple[int, int]
"""FLOPs forward and backward."""


@dataclass(frozen=True)
class Due:
    """What either side should have computed in training."""

    edge: Passes
    cloud: Passes


def plus(*parts: Passes) -> Passes:
    forward, backward = (sum(way) for way in zip(*parts, strict=True))
    return forward, backward


def times(count: int, passes: Passes) -> Passes:
    return count * passes[0], count * passes[1]


def ends(cut: str, tokens: int) -> Passes:
    """A step of the ends with LoRA on queries and values, and of the head."""
    return edge_formula("llama", cut, BATCH, tokens, BATCH * tokens)


def blocks(count: int, tokens: int, rows: int = BATCH) -> Passes:
    """Both passes of frozen blocks through which a gradient goes."""
    return span_formula("llama", count, rows, tokens)


def side_network(tokens: int) -> Passes:
    """A step of narrow blocks with 16 S² weights each, their entries and the way up; projections are the cloud's."""
    each = 2 * TAPS * W * S + 2 * TAPS * 16 * S**2 + 2 * S * D
    attention = 4 * TAPS * tokens**2 * S
    return BATCH * (tokens * each + attention), 2 * BATCH * (tokens * each + attention)


def at_ports(count: int, module: str, tokens: int, below: bool = True) -> Passes:
    """A step of LoRA at a module of so many blocks; the gradient of the lowest one's input may not be wanted."""
    inputs, outputs = SIZES[module]
    backward = 2 * outputs + inputs + inputs
    lost = 0 if below else inputs
    factor = 2 * BATCH * tokens * R
    return factor * count * (inputs + outputs), factor * (count * backward - lost)


@dataclass(frozen=True)
class Case:
    """A run, and what each side should compute in it when rows have so many tokens."""

    name: str
    given: dict[str, Any]
    due: Callable[[int], Due]


def split(tokens: int) -> Due:
    return Due(times(STEPS, ends("1:1", tokens)), times(STEPS, blocks(SPAN, tokens)))


def top(tokens: int) -> Due:
    once = blocks(1, tokens, ROWS)[0], 0
    return Due(plus(times(STEPS, ends("0:1", tokens)), once), (blocks(SPAN, tokens, ROWS)[0], 0))


def side(tokens: int) -> Due:
    head = 2 * BATCH * tokens * D * V
    step = plus((blocks(1, tokens)[0], 0), side_network(tokens), (head, head))
    projected = 2 * ROWS * tokens * D * W * TAPS
    once = blocks(1, tokens, ROWS)[0], 0
    return Due(plus(times(STEPS, step), once), (blocks(SPAN, tokens, ROWS)[0] + projected, 0))


def above(modules: tuple[str, ...], tokens: int) -> Passes:
    """A step of two blocks above a span that trains, and of the head: gradients go down through all of it."""
    head = 2 * BATCH * tokens * D * V
    return plus(blocks(2, tokens), *(at_ports(2, module, tokens) for module in modules), (head, head))


def dlora(tokens: int) -> Due:
    ports = plus(at_ports(SPAN, "q_proj", tokens), at_ports(SPAN, "v_proj", tokens))
    return Due(times(STEPS, plus(ends("1:1", tokens), ports)), times(STEPS, blocks(SPAN, tokens)))


def dlora_at_the_bottom(tokens: int) -> Due:
    """Nothing trains below the span, so no gradient goes through the lowest block's queries, keys and values."""
    ports = plus(at_ports(SPAN, "q_proj", tokens, below=False), at_ports(SPAN, "v_proj", tokens, below=False))
    forward, backward = blocks(SPAN, tokens)
    unasked = sum(2 * inputs * outputs for inputs, outputs in LLAMA.before.values()) + 2 * tokens * D  # and to no key
    cloud = forward, backward - BATCH * tokens * unasked
    return Due(times(STEPS, plus(above(("q_proj", "v_proj"), tokens), ports)), times(STEPS, cloud))


def dlora_at_the_last_module(tokens: int) -> Due:
    """The lowest block's last module has its ports' gradients from above, and none goes through the block itself."""
    ports = at_ports(SPAN, "down_proj", tokens, below=False)
    cloud = blocks(SPAN, tokens)[0], blocks(SPAN - 1, tokens)[1]
    return Due(times(STEPS, plus(above(("down_proj",), tokens), ports)), times(STEPS, cloud))


CASES = (
    Case("split", {"method": "split"}, split),
    Case("split --train top", {"method": "split", "train": "top"}, top),
    Case("side", SIDE, side),
    Case("dlora", {"method": "dlora"}, dlora),
    Case("dlora, nothing below", {"method": "dlora", "cut": "0:2"}, dlora_at_the_bottom),
    Case("dlora, last modules", {"method": "dlora", "cut": "0:2", "targets": ["down_proj"]}, dlora_at_the_last_module),
)


@pytest.fixture(scope="module")
def even_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one length that differ."""
    path = tmp_path_factory.mktemp("even") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": chr(97 + row) * LETTERS}) + "\n" for row in range(ROWS)))
    return path


def tokens_of(report: RunReport) -> int:
    """Tokens of a row; it ends in a mark of its own, and its last token predicts nothing."""
    assert report.tokens.real == STEPS * BATCH * LETTERS
    return LETTERS


def is_due(report: RunReport, due: Due) -> None:
    spent = report.cost
    for side, passes in ((spent.edge, due.edge), (spent.cloud, due.cloud)):
        found = (side.forward_flops or 0, side.backward_flops or 0)
        assert found == pytest.approx(passes, rel=WITHIN)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_sides_compute_what_the_formulas_say(
    servers: dict[str, Server], even_rows: Path, tmp_path: Path, case: Case
) -> None:
    kept = {"cache": tmp_path / "cache"} if case.name in ("side", "split --train top") else {}
    report = run_here(settings(servers["llama"], even_rows, **{**LORA, **kept, **case.given}), tmp_path / "run")
    is_due(report, case.due(tokens_of(report)))


@pytest.mark.parametrize(("method", "keep", "bits"), [("drop", 2, None), ("rank", 0.5, None), ("quant", None, 4)])
def test_on_an_emulator_the_edge_computes_what_it_is_made_of(
    tiny_models: dict[str, Path], even_rows: Path, tmp_path: Path, method: Any, keep: float | None, bits: Any
) -> None:
    folder = tmp_path / method
    build(Plan(tiny_models["llama"], Cut(1, 1), method, keep, bits, text=even_rows), folder, None, False, QUIET)
    given = {**LORA, "method": "offsite", "emulator": str(folder), "cut": None}
    report = run_here(settings(None, even_rows, **given), tmp_path / "run")
    tokens, recipe = tokens_of(report), Emulator.load(folder).recipe
    saved = sum(
        2 * inputs * outputs - 2 * recipe.ranks[name] * (inputs + outputs)
        for name, (inputs, outputs) in named_sizes().items()
        if name in recipe.ranks
    )
    standing = len([source for source in recipe.blocks if source is not None])
    assert (saved > 0, standing) == (method == "rank", 2 if method == "drop" else SPAN)
    middle = tuple(passes - standing * BATCH * tokens * saved for passes in blocks(standing, tokens))
    is_due(report, Due(times(STEPS, plus(ends("1:1", tokens), middle)), (0, 0)))  # type: ignore[arg-type]


def named_sizes() -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a block's linear modules by their names in it."""
    attention = {*LLAMA.before, "o_proj"}
    return {f"{'self_attn' if name in attention else 'mlp'}.{name}": sizes for name, sizes in SIZES.items()}
