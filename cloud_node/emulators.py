"""`cloud_node emulator`: build the stand-in of a span that is shipped to edges, and measure one anew.

Knows flags and what to say at the end; emulators are made by `emulator`.
"""

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from rich.console import Console

from cloud_node.comparing import against
from emulator import gap
from emulator.build import Built, build
from emulator.distil import DistilPlan
from emulator.measure import measure
from emulator.outline import refuse_other_than_language_models
from emulator.package import open_pair
from emulator.plan import Plan
from emulator.text import enough, read_text
from isthmus.cut import Cut
from isthmus.emulated.recipe import Distance, Emulator, Method
from isthmus.errors import InterruptedRunError, UsageError
from isthmus.load import resolve
from isthmus.report.stages import in_words, stages_told
from isthmus.report.verdict import FEWEST_ROWS
from isthmus.settings import pick_device, read_settings
from isthmus.trust.credentials import Credentials

app = typer.Typer(no_args_is_help=True, help="Build and measure lossy stand-ins of a span (Offsite-Tuning).")

Count = Annotated[int, Field(ge=1)]
Threads = Annotated[int | None, typer.Option(help="CPU threads for computing [all cores]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto]")]
MaxLength = Annotated[int | None, typer.Option(help="tokens of a row of text at most [256]")]
AsJson = Annotated[bool, typer.Option("--json", help="print what was found as JSON")]


KEPT_RANKS = 0.75
"""Of what was measured (docs/benchmarks.md), the method and share that protect the owner and still pay the edge."""


class BuildConfig(BaseModel):
    """Settings of a build; each is a flag."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    out: Path
    cut: str = "2:2"
    method: Method = "rank"
    keep: int | float | None = None
    bits: Literal[4, 8] | None = None
    text: Path | None = None
    distill: Path | None = None
    steps: Count = 200
    batch_size: Count = 8
    lr: Annotated[float, Field(gt=0)] = 1e-4
    seed: Annotated[int, Field(ge=0)] = 0
    minimum_gap: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max_length: Annotated[int, Field(ge=2)] = 256
    device: str = "auto"
    threads: Count | None = None
    certs: Path | None = None

    @field_validator("keep", mode="before")
    @classmethod
    def _blocks_or_share(cls, keep: Any) -> Any:
        if not isinstance(keep, str):
            return keep
        try:
            return int(keep) if keep.isdecimal() else float(keep)
        except ValueError:
            raise UsageError(f"{keep!r} is neither a whole number of blocks nor a share such as 0.5") from None

    @model_validator(mode="after")
    def _distilled_if_said_how(self) -> "BuildConfig":
        said = self.model_fields_set & {"steps", "batch_size", "lr", "seed"}
        if said and self.distill is None:
            raise UsageError(f"--{min(said).replace('_', '-')} is for distilling: give --distill F.jsonl or F.txt too")
        return self

    def plan(self) -> Plan:
        """What to build; a tenth of the steps warm up."""
        settings = DistilPlan(self.steps, self.batch_size, self.lr, math.ceil(self.steps / 10), self.seed)
        return Plan(
            model=resolve(self.model),
            cut=Cut.parse(self.cut),
            method=self.method,
            keep=KEPT_RANKS if self.keep is None and self.method == "rank" else self.keep,
            bits=self.bits,
            text=self.text,
            distill=self.distill,
            distillation=settings if self.distill is not None else None,
            minimum_gap=self.minimum_gap,
            max_length=self.max_length,
            device=pick_device(self.device),
        )


@app.command("build", epilog="Example: cloud_node emulator build --model M --text F --out E")
def build_command(
    out: Annotated[Path, typer.Option(help="folder for the bundle: absent or empty")],
    model: Annotated[str | None, typer.Option(help="directory or Hugging Face id of the model")] = None,
    cut: Annotated[str | None, typer.Option(help="bottom:top [2:2]")] = None,
    method: Annotated[str | None, typer.Option(help="drop, share, rank or quant [rank]")] = None,
    keep: Annotated[
        str | None, typer.Option(help="blocks, or a share: of the blocks; for rank of each matrix [0.75]")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8 bits a weight, with any method")] = None,
    text: Annotated[
        Path | None, typer.Option(help="public .jsonl or .txt to calibrate and measure on [--distill]")
    ] = None,
    distill: Annotated[Path | None, typer.Option(help="public .jsonl or .txt to distil on")] = None,
    steps: Annotated[int | None, typer.Option(help="of distillation [200]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows of a distillation step [8]")] = None,
    lr: Annotated[float | None, typer.Option(help="peak rate of distillation [1e-4]")] = None,
    seed: Annotated[int | None, typer.Option(help="of distillation [0]")] = None,
    minimum_gap: Annotated[
        float | None,
        typer.Option(help="refuse an emulator whose gap's lower limit at 95 % is under so many nats per token"),
    ] = None,
    max_length: MaxLength = None,
    device: Device = None,
    threads: Threads = None,
    certs: Annotated[Path | None, typer.Option(help="folder of the server's certificate, whose key signs")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a distillation that was interrupted")] = False,
    as_json: AsJson = False,
) -> None:
    """Build an emulator of a model's span, and say how far it is from it."""
    given = {
        "model": model,
        "out": out,
        "cut": cut,
        "method": method,
        "keep": keep,
        "bits": bits,
        "text": text,
        "distill": distill,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "minimum_gap": minimum_gap,
        "max_length": max_length,
        "device": device,
        "threads": threads,
        "certs": certs,
    }
    settings = read_settings(BuildConfig, None, given)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    key = None if settings.certs is None else Credentials.load(settings.certs).signing_key()
    with _told_if_interrupted():
        built = build(settings.plan(), out, key, resume, Console(stderr=True))
    if as_json:
        typer.echo(json.dumps(_facts(built, out), indent=1))
        return
    for name, value in _table(built, settings.max_length):
        typer.echo(f"{name:<13}{value}")
    if built.about.distance is None:
        typer.echo("gap          not measured: give --text F, or nobody knows what this protects")
    signed = ["--certs", str(settings.certs)] if settings.certs is not None else []
    if not signed:
        typer.echo("signature    of nobody: edges with certificates will refuse it; build with --certs to sign it")
    serve = ["--emulators", str(out), "--model", settings.model, "--cut", settings.cut, *signed]
    typer.echo(f"next: cloud_node serve {shlex.join(serve)}")


@app.command("evaluate", epilog="Example: cloud_node emulator evaluate --emulator E --model DIR --text F.jsonl")
def evaluate_command(
    emulator: Annotated[Path, typer.Option(help="folder of an emulator's bundle")],
    model: Annotated[str, typer.Option(help="directory or Hugging Face id of the model that it was built from")],
    text: Annotated[Path, typer.Option(help="public .jsonl or .txt; its last tenth is measured, 64 rows at most")],
    max_length: MaxLength = None,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Check that an emulator is whole and of this model, and measure anew how far it is from its span."""
    if threads is not None:
        torch.set_num_threads(threads)
    where, directory = pick_device(device or "auto"), resolve(model)
    row_tokens = 256 if max_length is None else max_length
    with _told_if_interrupted():
        refuse_other_than_language_models(directory)
        public = read_text(text, directory, row_tokens)
        pair, manifest = open_pair(emulator, directory, where)
        distance = measure(pair, public.held_out, public.digest, Console(stderr=True))
    if as_json:
        found = {"bundle": manifest.id, "model": manifest.model_digest, "gap": distance.gap}
        typer.echo(json.dumps({**found, "distance": distance.model_dump()}, indent=1))
        return
    typer.echo(f"{'model':<13}{manifest.model_digest[:16]}, which the emulator was built from")
    for name, value in _distances(distance, row_tokens):
        typer.echo(f"{name:<13}{value}")


@contextmanager
def _told_if_interrupted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted; nothing is kept: the same command begins anew") from None


def _facts(built: Built, out: Path) -> dict[str, Any]:
    gap = None if built.about.distance is None else built.about.distance.gap
    stages = stages_told(built.costs) if built.costs is not None else ()
    facts = {"bundle": built.manifest.id, "out": str(out), "span_bytes": built.span_bytes, "gap": gap}
    facts |= {"stages": [stage.model_dump(exclude_none=True) for stage in stages]}
    return {**facts, **built.about.model_dump()}


def _table(built: Built, max_length: int) -> list[tuple[str, str]]:
    about = built.about
    return [
        ("method", f"{about.recipe.method} at cut {about.recipe.cut}"),
        *_shape(about),
        ("bytes", against(about.weight_bytes, built.span_bytes)),
        ("FLOPs/token", against(about.flops_per_token, about.span_flops_per_token)),
        *(_distances(about.distance, max_length) if about.distance is not None else ()),
        ("bundle", built.manifest.id),
        *(in_words(built.costs) if built.costs is not None else ()),
    ]


def _shape(about: Emulator) -> list[tuple[str, str]]:
    recipe = about.recipe
    rows = [("blocks", f"{len(recipe.kept)} of {len(recipe.blocks)}: {', '.join(map(str, recipe.kept))}")]
    if recipe.ranks:
        rows.append(("ranks", ", ".join(f"{name} {rank}" for name, rank in recipe.ranks.items())))
    if recipe.bits is not None:
        rows.append(("bits", str(recipe.bits)))
    return rows


def _distances(distance: Distance, max_length: int) -> list[tuple[str, str]]:
    measured = f"{distance.rows:,} held-out row{'s' if distance.rows > 1 else ''}"
    rows = [
        ("measured on", f"{measured}, {distance.tokens:,} tokens"),
        ("distance", f"{distance.hidden:.4f}"),
        ("loss", f"{distance.loss:.4f} nats per token; the model's {distance.loss_of_span:.4f}"),
        ("gap", gap.figures(distance)),
    ]
    warning = gap.warning(distance)
    if warning is not None:
        rows.append(("protection", warning))
    if distance.rows < FEWEST_ROWS:
        few = f"means little of {measured}, a tenth of the text: {enough(max_length)} would do"
        rows.append(("interval", few))
    return rows
