"""Tuned ends into the whole model, whether that paid, and what it protects, in words.

Knows which models are scored, and what to say next; what may go in, and how, is known by `emulator.plug_in`.
"""

import json
import logging
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch import nn

from cloud_node.comparing import Comparison, OnEmulator
from cloud_node.plugging_costs import PluggingCosts
from emulator.changes import Changed
from emulator.folder import refuse_taken
from emulator.outline import Outline
from emulator.package import verified
from emulator.plug_in import plug_in, tuned_on
from emulator.tuned_ends import TunedEnds, check
from isthmus.adapter_files import OWN_WEIGHTS, PEFT_WEIGHTS
from isthmus.architectures import longest_row
from isthmus.bundle import MANIFEST
from isthmus.cut import Cut
from isthmus.device import pick_device
from isthmus.emulated.load import load_emulated
from isthmus.errors import BundleError, RunError, UsageError
from isthmus.load import load_config, load_tokenizer, load_whole, model_digest, resolve
from isthmus.training.data import Example, read_examples
from isthmus.training.outputs import select_outputs
from isthmus.training.progress import meter
from isthmus.training.scoring import Scores, score
from isthmus.trust.credentials import load_signer

ROWS_AT_ONCE = 32
MAX_TOKENS = 512
"""Longer rows are shortened, as edges do unless told otherwise."""


def run(
    model: str,
    adapter: Path,
    out: Path,
    signer: Path | None,
    eval_data: Path | None,
    emulator: Path | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """What `cloud_node plug-in` does with its flags; what came of it is printed.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)
    key = None if signer is None else load_signer(signer)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    where = pick_device(device)
    place, emulator = out.resolve(), emulator and emulator.resolve()  # --out . puts another folder in this one's place
    refuse_taken(place)
    directory = resolve(model).resolve()
    rows = _rows(directory, eval_data) if eval_data is not None else ()
    outline = Outline.of(directory, model_digest(directory))
    tuned = check(submission(adapter), outline, key)
    if emulator is not None:
        _check_emulator(emulator, directory, tuned, outline)
    costs = PluggingCosts()
    with costs.plugging_in():
        changed = plug_in(tuned, directory, place, console)
    try:
        compared = _compare(directory, place, emulator, tuned, _Scoring(rows, where, console, costs)) if rows else None
        costs.save(place, submission(adapter))
    except (BundleError, RunError) as error:
        raise type(error)(f"{error}; the plugged-in model stands in {out} all the same") from None
    if as_json:
        typer.echo(json.dumps(_as_dict(tuned, changed, out, compared)))
    else:
        _say(tuned, changed, out, compared)


def submission(adapter: Path) -> Path:
    """The folder itself, or the one submission that an edge's folder holds.

    Raises:
        UsageError: it holds several.
    """
    if any((adapter / name).exists() for name in (MANIFEST, PEFT_WEIGHTS, OWN_WEIGHTS)):
        return adapter
    inside = sorted(path.parent for path in adapter.glob(f"[!.]*/{MANIFEST}"))
    if len(inside) > 1:
        names = ", ".join(path.name for path in inside)
        raise UsageError(f"{adapter} holds {len(inside)} submissions; name the folder of one with --adapter: {names}")
    return inside[0] if inside else adapter


def _rows(directory: Path, eval_data: Path) -> tuple[Example, ...]:
    longest = longest_row(load_config(directory)) or MAX_TOKENS
    return read_examples(eval_data, load_tokenizer(directory), min(longest, MAX_TOKENS)).examples


def _check_emulator(emulator: Path, directory: Path, tuned: TunedEnds, outline: Outline) -> None:
    """An adapter without a manifest is of no known cut: there it is enough that none of it is in the span."""
    manifest = verified(emulator, directory, outline.digest)
    cut = Cut.parse(manifest.cut)
    if tuned.cut is not None and tuned.cut != cut:
        raise BundleError(f"{emulator} is of cut {cut}, and the adapter of {tuned.cut}; name the one it was tuned on")
    if tuned.emulator not in (None, manifest.id):
        raise BundleError(
            f"the adapter was tuned on emulator {tuned.emulator:.16}; {emulator} is {manifest.id[:16]}: name the former"
        )
    inside = outline.in_span(tuned.modules, cut)
    if inside:
        raise UsageError(f"the adapter adapts {inside[0]}, where the emulator stands; plug it in without --emulator")


@dataclass(frozen=True)
class _Scoring:
    """The rows that models are scored on, where, and who is told how far it is."""

    rows: tuple[Example, ...]
    device: torch.device
    console: Console
    costs: PluggingCosts

    def of(self, model: nn.Module, label: str) -> Scores:
        rows, model = self.rows, model.to(self.device)
        with meter(self.console, f"score the {label}", len(rows)) as progress, self.costs.scoring(model) as ran:

            def go_on(done: int, total: int) -> None:
                progress.update(len(rows) * done // total)

            return score(model, rows, ROWS_AT_ONCE, self.device, go_on, ran)

    def of_whole(self, directory: Path, label: str) -> Scores:
        """In float32, as models are served unless told otherwise."""
        model, _ = load_whole(directory, torch.float32)
        select_outputs(model)
        return self.of(model, label)


def _compare(
    untouched: Path, plugged_in: Path, emulator: Path | None, tuned: TunedEnds, scoring: _Scoring
) -> Comparison:
    return Comparison(
        scoring.of_whole(untouched, "untouched model"),
        scoring.of_whole(plugged_in, "plugged-in model"),
        None if emulator is None else _on_emulator(emulator, untouched, tuned, scoring),
    )


def _on_emulator(emulator: Path, model: Path, tuned: TunedEnds, scoring: _Scoring) -> OnEmulator:
    loaded = load_emulated(emulator, torch.float32)
    select_outputs(loaded.model)
    before = scoring.of(loaded.model, "emulator")
    around = tuned_on(loaded.model.cpu(), tuned)
    select_outputs(loaded.model)  # again, for an adapter around the output layer
    after = scoring.of(around, "tuned emulator")
    stored = load_config(model).dtype or torch.float32
    return OnEmulator(loaded.about, loaded.about.span_parameters * stored.itemsize, before, after)


def _as_dict(tuned: TunedEnds, changed: Changed, out: Path, compared: Comparison | None) -> dict[str, Any]:
    made = {"kind": tuned.kind, "cut": None if tuned.cut is None else str(tuned.cut), "signed": tuned.signed}
    told = {"weights": changed.weights, "parameters": changed.parameters, "untied": changed.untied}
    scores = None if compared is None else compared.as_dict()
    return {"out": str(out), **made, **told, "dtype": changed.dtype, "scores": scores}


def _say(tuned: TunedEnds, changed: Changed, out: Path, compared: Comparison | None) -> None:
    if not tuned.signed:
        typer.echo("nobody vouches for this adapter: no --signer was given")
    if tuned.cut is None:
        typer.echo("which model it was tuned on is not known, for it has no manifest: only its names and shapes fit")
    typer.echo(f"{out}: {changed.in_words()}, by {tuned.kind}")
    if changed.dtype != "float32":
        typer.echo(f"stored in {changed.dtype}, as the model is: changes too small for it are rounded away")
    if changed.untied:
        typer.echo("the output layer was adapted and no longer shares the embedding's matrix: the model grew by it")
    for line in compared.lines() if compared is not None else ():
        typer.echo(line)
    cut = "" if tuned.cut is None else f" --cut {tuned.cut}"
    typer.echo(f"next: cloud_node serve --model {shlex.quote(str(out))}{cut} --certs certs/server")
