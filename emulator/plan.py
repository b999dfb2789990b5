"""What is to be built, the public text that it takes, and a digest of everything that decides the bundle's bytes.

Knows settings, files and rows of text; builds nothing and knows no weights.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from emulator.distil import DistilPlan
from emulator.text import PublicText, enough, read_text
from isthmus.cut import Cut
from isthmus.device import runtime
from isthmus.emulated.forms import Bits
from isthmus.emulated.recipe import Method, Recipe
from isthmus.errors import DataError, UsageError
from isthmus.report.verdict import FEWEST_ROWS
from isthmus.training.data import TokenSequence
from isthmus.weights import COMPANIONS

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """What to build.

    Attributes:
        model: folder of the model.
        cut: of the model.
        method, keep, bits: as `isthmus.emulated.shrink.make_recipe` takes them.
        text: public text to calibrate with and to measure on; None: the text of `distill`, if there is one.
        distill: public text to distil on; None: no distillation.
        distillation: its settings; there with `distill`.
        minimum_gap: nats per token that the emulator must be worse than the model, by the lower limit of the gap's 95 %
            interval; None: any emulator will do.
        max_length: tokens of a row of text.
        device: what is computed on; it decides the last bits.
    """

    model: Path
    cut: Cut
    method: Method
    keep: float | None = None
    bits: Bits | None = None
    text: Path | None = None
    distill: Path | None = None
    distillation: DistilPlan | None = None
    minimum_gap: float | None = None
    max_length: int = 256
    device: torch.device = CPU


@dataclass(frozen=True)
class Texts:
    """What was read: to measure and calibrate with, and to distil on. No row to make an emulator with is held out."""

    measured: PublicText | None
    distilled: PublicText | None


def read_texts(plan: Plan, console: Console) -> Texts:
    """The text of a plan, without the rows that would have an emulator measured on what it was made with.

    Raises:
        UsageError: the plan needs text and names none.
        DataError: the text cannot be used, repeats itself too much, or is too little for `minimum_gap`.
    """
    path = plan.text or plan.distill
    if path is None:
        _refuse_without(plan)
        return Texts(None, None)
    measured = read_text(path, plan.model, plan.max_length)
    if plan.minimum_gap is not None:
        _check_rows(path, measured, plan.max_length)
    both = plan.distill == path
    if plan.method == "rank" or both:
        measured = _apart(path, measured, measured.held_out, console)
    if plan.distill is None or both:
        return Texts(measured, measured if both else None)
    distilled = read_text(plan.distill, plan.model, plan.max_length)
    return Texts(measured, _apart(plan.distill, distilled, measured.held_out, console))


def made_of(plan: Plan, recipe: Recipe, digest: str, texts: Texts) -> str:
    """SHA-256 of everything that decides the content of the bundle but the kind of machine.

    Args:
        plan: what to build.
        recipe: as it came of the plan.
        digest: of the model's configuration and weights.
        texts: as they were read.
    """
    facts = {
        "model": digest,
        "name": plan.model.resolve().name,
        "companions": _companions(plan.model),
        "recipe": recipe.model_dump(),
        "text": texts.measured and texts.measured.digest,
        "distill": texts.distilled and texts.distilled.digest,
        "distillation": plan.distillation and asdict(plan.distillation),
        "max_length": plan.max_length,
        "runtime": runtime(str(plan.device)),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def settings_of(plan: Plan, digest: str, texts: Texts) -> dict[str, Any]:
    """What two builds of one folder can differ in, as JSON, by the flag that says it; the machine is under `runtime`.

    Args:
        plan: what to build.
        digest: of the model's configuration and weights.
        texts: as they were read.
    """
    learnt = {} if plan.distillation is None else asdict(plan.distillation)
    return {
        "model": [plan.model.resolve().name, digest, _companions(plan.model)],
        "cut": str(plan.cut),
        "method": plan.method,
        "keep": plan.keep,
        "bits": plan.bits,
        "text": texts.measured and texts.measured.digest,
        "distill": texts.distilled and texts.distilled.digest,
        **{name.replace("_", "-"): learnt.get(name) for name in ("steps", "batch_size", "lr", "seed")},
        "max-length": plan.max_length,
        "runtime": runtime(str(plan.device)),
    }


def _refuse_without(plan: Plan) -> None:
    if plan.method == "rank":
        raise UsageError("method rank needs public text to calibrate with: give --text F.jsonl or F.txt")
    if plan.minimum_gap is not None:
        raise UsageError("--minimum-gap needs public text to measure on: give --text F.jsonl or F.txt")


def _check_rows(path: Path, text: PublicText, max_length: int) -> None:
    held_out, every = len(text.held_out), len(text.held_out) + len(text.rows)
    if held_out < FEWEST_ROWS:
        raise DataError(
            f"{path}: {held_out} of its {every} rows are held out, and the interval that --minimum-gap goes by needs "
            f"{FEWEST_ROWS}: give {enough(max_length)}"
        )


def _apart(path: Path, text: PublicText, held_out: tuple[TokenSequence, ...], console: Console) -> PublicText:
    left = text.without(held_out)
    taken = len(text.rows) - len(left.rows)
    if taken:
        console.print(
            f"{path}: {taken} of {len(text.rows)} rows are also held out; nothing is made with them", highlight=False
        )
    return left


def _companions(model: Path) -> dict[str, str]:
    return {name: _digest(model / name) for name in COMPANIONS if (model / name).is_file()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
