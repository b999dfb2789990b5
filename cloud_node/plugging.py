"""`cloud_node plug-in`: tuned ends into the whole model, and whether that paid, in words.

Knows flags, scores and what to say next; what may go in, and how, is known by `emulator.plug_in`.
"""

import json
import logging
import shlex
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
import typer
from rich.console import Console

from emulator.plug_in import Changed, plug_in, refuse_taken
from emulator.tuned_ends import TunedEnds, check
from isthmus.load import load_config, load_tokenizer, load_whole, model_digest, resolve
from isthmus.report.interval import paired, ratio_interval
from isthmus.report.schema import Score
from isthmus.settings import pick_device
from isthmus.training.data import Example, read_examples
from isthmus.training.outputs import select_outputs
from isthmus.training.progress import meter
from isthmus.training.scoring import Scores, score
from isthmus.trust.signing import load_public

ROWS_AT_ONCE = 32
MAX_TOKENS = 512
"""Longer rows are shortened, as edges do unless told otherwise."""

Verdict: TypeAlias = Literal["better", "worse", "undecided"]
Interval: TypeAlias = tuple[float, float, float]
"""A figure, its lower and its upper limit at 95 %."""


@dataclass(frozen=True)
class Compared:
    """The untouched and the plugged-in model on the same rows.

    Attributes:
        rows: how many.
        untouched, plugged_in: loss, and accuracy with its interval where rows have choices.
        loss_rise: nats per token, with its 95 % interval; None for a single row, which has none.
        accuracy_rise: likewise; None where no row has choices.
        verdict: by accuracy where there is one, else by loss; `undecided` where the interval holds 0.
    """

    rows: int
    untouched: Score
    plugged_in: Score
    loss_rise: Interval | None
    accuracy_rise: Interval | None
    verdict: Verdict

    @classmethod
    def of(cls, before: Scores, after: Scores) -> "Compared":
        """Compare scores of the same rows, row by row."""
        accuracy = paired(before.correct, after.correct) if before.correct else None
        rises = [new - old for old, new in zip(before.nats, after.nats, strict=True)]
        loss = ratio_interval(rises, before.tokens) if before.rows > 1 else None
        gain = accuracy or (loss and (-loss[0], -loss[2], -loss[1]))
        return cls(
            before.rows,
            Score.of(before.loss, before.correct),
            Score.of(after.loss, after.correct),
            loss,
            accuracy,
            _verdict(gain),
        )

    def in_words(self) -> str:
        """One sentence for the owner."""
        by = _signed(self.accuracy_rise, "accuracy") or _signed(self.loss_rise, "loss") or "no interval"
        match self.verdict:
            case "better":
                return f"plugging in paid: {by} on {self.rows} rows"
            case "worse":
                return f"plugging in made the model worse: {by} on {self.rows} rows; do not serve it for such rows"
            case "undecided":
                return f"{self.rows} rows do not tell whether plugging in paid: {by}; score it on more"


def _verdict(gain: Interval | None) -> Verdict:
    if gain is None or gain[1] <= 0 <= gain[2]:
        return "undecided"
    return "better" if gain[1] > 0 else "worse"


def _signed(rise: Interval | None, name: str) -> str:
    return "" if rise is None else f"{name} {rise[0]:+.4f} (95 % {rise[1]:+.4f} to {rise[2]:+.4f})"


def plug_in_command(
    model: Annotated[str, typer.Option(help="directory or Hugging Face id of the model")],
    adapter: Annotated[Path, typer.Option(help="a run's adapter folder, or what an edge submitted")],
    out: Annotated[Path, typer.Option(help="folder for the plugged-in model: absent or empty")],
    signer: Annotated[Path | None, typer.Option(help="NAME.pub, the key that must have signed it")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="rows that both models are scored on, JSON Lines")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for computing [all cores]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Plug the ends that an edge tuned into the whole model, and say whether that paid.

    The adapter is checked first: hashes, signature, names, shapes, finite values. A refused one leaves nothing behind.

    Example: cloud_node plug-in --model models/smollm2-135m --adapter submitted/alice --out models/plugged-in
    --signer certs/authority/issued/alice.pub --eval-data held-out.jsonl
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    refuse_taken(out)
    directory = resolve(model)
    rows = _rows(directory, eval_data) if eval_data is not None else ()
    tuned = check(adapter, directory, model_digest(directory), load_public(signer) if signer is not None else None)
    changed = plug_in(tuned, directory, out, console)
    compared = _compare(directory, out, rows, console) if rows else None
    if as_json:
        typer.echo(json.dumps(_as_dict(tuned, changed, out, compared)))
    else:
        _say(tuned, changed, out, compared)


def _rows(directory: Path, eval_data: Path) -> tuple[Example, ...]:
    longest = getattr(load_config(directory).get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
    return read_examples(eval_data, load_tokenizer(directory), min(longest, MAX_TOKENS)).examples


def _compare(untouched: Path, plugged_in: Path, rows: tuple[Example, ...], console: Console) -> Compared:
    before = _score(untouched, rows, console, "score the untouched model")
    return Compared.of(before, _score(plugged_in, rows, console, "score the plugged-in model"))


def _score(directory: Path, rows: tuple[Example, ...], console: Console, label: str) -> Scores:
    """In float32, as models are served unless told otherwise."""
    model, _ = load_whole(directory, torch.float32)
    select_outputs(model)
    device = pick_device("auto")
    with meter(console, label, len(rows)) as progress:
        return score(
            model.to(device),
            rows,
            ROWS_AT_ONCE,
            device,
            lambda done, total: progress.update(len(rows) * done // total),
        )


def _as_dict(tuned: TunedEnds, changed: Changed, out: Path, compared: Compared | None) -> dict[str, Any]:
    made = {"kind": tuned.kind, "cut": None if tuned.cut is None else str(tuned.cut), "signed": tuned.signed}
    scores = {"scores": None} if compared is None else {"scores": {**_plain(compared), "words": compared.in_words()}}
    return {"out": str(out), **made, **asdict(changed), **scores}


def _plain(compared: Compared) -> dict[str, Any]:
    return {
        **vars(compared),
        "untouched": compared.untouched.model_dump(),
        "plugged_in": compared.plugged_in.model_dump(),
    }


def _say(tuned: TunedEnds, changed: Changed, out: Path, compared: Compared | None) -> None:
    if not tuned.signed:
        typer.echo("nobody vouches for this adapter: no --signer was given")
    typer.echo(f"{out}: {changed.parameters} parameters changed in {changed.weights} weights, by {tuned.kind}")
    if changed.untied:
        typer.echo("the output layer was adapted and no longer shares the embedding's matrix: the model grew by it")
    if compared is not None:
        for name, scored in (("untouched", compared.untouched), ("plugged in", compared.plugged_in)):
            typer.echo(f"{name:10}  {scored.in_words()}")
        typer.echo(compared.in_words())
    cut = "" if tuned.cut is None else f" --cut {tuned.cut}"
    typer.echo(f"next: cloud_node serve --model {shlex.quote(str(out))}{cut} --certs certs/server")
