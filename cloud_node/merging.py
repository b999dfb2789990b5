"""An adapter of any method that can be merged, into the whole model, and what that changed, in words.

Knows what to say next; what may go in, and how, is known by `emulator.merge` and `emulator.plug_in`.
"""

import json
import logging
import shlex
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.console import Console

from cloud_node.plugging import submission
from emulator.changes import Changed
from emulator.folder import refuse_taken
from emulator.merge import Adapter, examine, merge
from emulator.outline import Outline
from emulator.plug_in import plug_in
from emulator.tuned_ends import TunedEnds, check
from isthmus.adapter_files import OWN_WEIGHTS, PEFT_WEIGHTS
from isthmus.errors import BundleError
from isthmus.load import model_digest, resolve
from isthmus.trust.credentials import load_signer

PICKLED = "adapter_model.bin"
"""What older versions of peft wrote."""


def run(model: str, adapter: Path, out: Path, signer: Path | None, threads: int | None, as_json: bool) -> None:
    """What `cloud_node merge` does with its flags; what came of it is printed.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)
    key = None if signer is None else load_signer(signer)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    place = out.resolve()  # --out . puts another folder in this one's place
    refuse_taken(place)
    directory = resolve(model).resolve()
    checked, merged = _merged(submission(adapter), directory, place, key, console)
    if as_json:
        typer.echo(json.dumps(_as_dict(checked, merged, out)))
    else:
        _say(checked, merged, out)


def _merged(
    adapter: Path, model: Path, out: Path, signer: Ed25519PublicKey | None, console: Console
) -> tuple[Adapter | TunedEnds, Changed]:
    """Merge what is in peft's format; plug in what is in ours."""
    if (adapter / PICKLED).exists() and not (adapter / PEFT_WEIGHTS).exists():
        raise BundleError(f"{adapter / PICKLED} is a pickle, which may run code: have it saved as {PEFT_WEIGHTS}")
    whole = Outline.of(model, model_digest(model))
    if not (adapter / OWN_WEIGHTS).exists() or (adapter / PEFT_WEIGHTS).exists():
        examined = examine(adapter, model, whole, signer)
        return examined, merge(examined, model, out, console)
    tuned = check(adapter, whole, signer, model)
    return tuned, plug_in(tuned, model, out, console)


def _method(checked: Adapter | TunedEnds) -> str:
    return checked.kind if isinstance(checked, TunedEnds) else checked.settings.called


def _as_dict(checked: Adapter | TunedEnds, merged: Changed, out: Path) -> dict[str, Any]:
    cut = None if checked.cut is None else str(checked.cut)
    made = {"method": _method(checked), "cut": cut, "signed": checked.signer is not None, "labels": checked.labels}
    return {"out": str(out), **made, **asdict(merged)}


def _say(checked: Adapter | TunedEnds, merged: Changed, out: Path) -> None:
    if checked.signer is None:
        typer.echo("nobody vouches for this adapter: no --signer was given")
    if checked.cut is None:
        typer.echo("which model it was trained on is not known, for it has no manifest: only its names and shapes fit")
    typer.echo(f"{out}: {merged.in_words()}, by {_method(checked)}")
    if checked.labels is not None:
        typer.echo(f"it is a classifier of {checked.labels:,} labels, which have the order of the run's `labels`")
    if merged.dtype != "float32":
        typer.echo(f"stored in {merged.dtype}, as the model is: changes too small for it are rounded away")
    if merged.untied:
        typer.echo(
            "the output layer no longer shares the embedding's matrix, for one was adapted alone: the model grew by it"
        )
    cut = "" if checked.cut is None else f" --cut {checked.cut}"
    typer.echo(f"next: cloud_node serve --model {shlex.quote(str(out))}{cut} --certs certs/server")
