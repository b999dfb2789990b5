"""Building an emulator, measuring one anew, and what the owner is told of either.

Knows settings and words; emulators are made and measured by `emulator`.
"""

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from cloud_node.comparing import against
from cloud_node.emulators import BuildConfig
from emulator import gap
from emulator.build import Built, build
from emulator.distil import DistilPlan
from emulator.measure import measure
from emulator.outline import refuse_other_than_language_models
from emulator.package import open_pair
from emulator.plan import Plan
from emulator.text import enough, read_text
from isthmus.cut import Cut
from isthmus.device import pick_device
from isthmus.emulated.recipe import Distance, Emulator
from isthmus.errors import InterruptedRunError
from isthmus.load import resolve
from isthmus.report.stages import in_words, stages_told
from isthmus.report.verdict import FEWEST_ROWS
from isthmus.trust.credentials import Credentials

KEPT_RANKS = 0.75
"""Of what was measured (docs/benchmarks.md), the method and share that protect the owner and still pay the edge."""


def build_emulator(settings: BuildConfig, resume: bool, as_json: bool) -> None:
    """What `cloud_node emulator build` does; what was built is printed.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    key = None if settings.certs is None else Credentials.load(settings.certs).signing_key()
    with _told_if_interrupted():
        built = build(plan_of(settings), settings.out, key, resume, Console(stderr=True))
    if as_json:
        typer.echo(json.dumps(_facts(built, settings.out), indent=1))
        return
    for name, value in _table(built, settings.max_length):
        typer.echo(f"{name:<13}{value}")
    if built.about.distance is None:
        typer.echo("gap          not measured: give --text F, or nobody knows what this protects")
    signed = ["--certs", str(settings.certs)] if settings.certs is not None else []
    if not signed:
        typer.echo("signature    of nobody: edges with certificates will refuse it; build with --certs to sign it")
    serve = ["--emulators", str(settings.out), "--model", settings.model, "--cut", settings.cut, *signed]
    typer.echo(f"next: cloud_node serve {shlex.join(serve)}")


def measure_anew(
    emulator: Path, model: str, text: Path, row_tokens: int, device: str, threads: int | None, as_json: bool
) -> None:
    """What `cloud_node emulator evaluate` does; what was measured is printed.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    where, directory = pick_device(device), resolve(model)
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


def plan_of(settings: BuildConfig) -> Plan:
    """What to build; a tenth of the steps warm up."""
    distillation = DistilPlan(
        settings.steps, settings.batch_size, settings.lr, math.ceil(settings.steps / 10), settings.seed
    )
    return Plan(
        model=resolve(settings.model),
        cut=Cut.parse(settings.cut),
        method=settings.method,
        keep=KEPT_RANKS if settings.keep is None and settings.method == "rank" else settings.keep,
        bits=settings.bits,
        text=settings.text,
        distill=settings.distill,
        distillation=distillation if settings.distill is not None else None,
        minimum_gap=settings.minimum_gap,
        max_length=settings.max_length,
        device=pick_device(settings.device),
    )


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
