"""From a model and a method to a finished emulator: fill, distil, measure, package.

Knows the order of things and what may stand in the way of each; every step is another module's.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from emulator.calibrate import fill
from emulator.costs import Costs
from emulator.damage import reason_of
from emulator.distil import distil
from emulator.folder import is_free, refuse_taken
from emulator.gap import check_gap
from emulator.measure import measure
from emulator.outline import refuse_other_than_language_models
from emulator.package import BuiltFrom, describe, write_bundle
from emulator.pair import Pair
from emulator.plan import Plan, Texts, made_of, read_texts, settings_of
from emulator.unfinished import Unfinished
from isthmus import bundle
from isthmus.emulated.load import repeat_blocks
from isthmus.emulated.recipe import Distance, Distillation, Emulator, Recipe
from isthmus.emulated.shrink import make_recipe
from isthmus.errors import BundleError, UsageError
from isthmus.ledger import told
from isthmus.ledger.told import Told
from isthmus.linears import Linear, Site, linears_of
from isthmus.load import load_config, load_whole, model_digest, outline


@dataclass(frozen=True)
class Built:
    """A finished emulator.

    Attributes:
        span_bytes: of the blocks that it stands for, as the model stores them.
        costs: what it took; None where that is no longer known.
    """

    manifest: bundle.Manifest
    about: Emulator
    span_bytes: int
    costs: Told | None = field(compare=False)


def build(plan: Plan, out: Path, key: Ed25519PrivateKey | None, resume: bool, console: Console) -> Built:
    """Build an emulator into `out`, which appears whole or not at all.

    The same plan, model, tokenizer and text give the same bytes in any process on the same type of machine with as many
    threads and the same versions of isthmus, torch and transformers; without `key`, all but the signature.

    Args:
        plan: what to build.
        out: absent or empty, or what the same plan has finished before, which stays as it is.
        key: signs the bundle; None: a key that nobody has afterwards.
        resume: go on with a distillation of the same plan that was interrupted.
        console: where progress is shown.

    Raises:
        UsageError: the plan contradicts itself, `out` is taken, or an unfinished build of it has other settings.
        ModelError: the model is no causal language model or cannot be cut so, what it or the emulator makes of the text
            is not finite, or the emulator is nearer to it than `minimum_gap` allows.
        DataError: the text cannot be used, or is too little.
        InterruptedRunError: stopped by the user; `resume` goes on with what was distilled, of which the error tells.
        BundleError: the bundle cannot be written.
        RunError: no checkpoint can be written, or the one to resume from is damaged.
    """
    out = out.resolve()
    refuse_other_than_language_models(plan.model)
    texts = read_texts(plan, console)
    recipe, linears = _recipe(plan)
    origin = BuiltFrom(plan.model, model_digest(plan.model), load_config(plan.model).dtype or torch.float32)
    digest = made_of(plan, recipe, origin.digest, texts)
    unfinished = Unfinished.of(out, digest, settings_of(plan, origin.digest, texts))
    found = _finished(out, digest, key, resume)
    if found is not None:
        stands = f"; {out} still holds it, and `cloud_node serve --emulators` would offer it: remove that folder"
        check_gap(found[1], plan.minimum_gap, stands)
    else:
        unfinished.check(resume, console)
        with unfinished.told_if_interrupted():
            pair = _pair(plan, recipe)
            costs = Costs(pair)
            fill(pair, linears, texts.measured.calibration if texts.measured else [], console, costs)
            repeat_blocks(pair.twin_found, recipe, pair.repeated)
            distillation = _distil(pair, plan, texts, unfinished, resume, console, costs)
            _round(pair, origin.dtype)
            distance = _distance(pair, texts, console, costs)
            _to_cpu(pair)
            about = describe(pair, origin.dtype, distance, distillation)
            check_gap(about, plan.minimum_gap, _kept(unfinished))
            found = write_bundle(pair, origin, about, digest, out, key), about
            _save(costs, out, found[0])
    manifest, about = found
    unfinished.remove()
    return Built(manifest, about, about.span_parameters * origin.dtype.itemsize, _costs(out, manifest))


def _save(costs: Costs, out: Path, manifest: bundle.Manifest) -> None:
    """Beside the bundle and not in it: the same plan gives the same bundle, and never the same seconds."""
    try:
        costs.save(out, manifest.id, manifest.total_bytes)
    except OSError as error:
        raise BundleError(
            f"{told.beside(out)} cannot be written ({error.strerror}); the emulator stands in {out} all the same"
        ) from None


def _costs(out: Path, manifest: bundle.Manifest) -> Told | None:
    try:
        found = told.read(told.beside(out))
    except BundleError:
        return None
    return found if found is not None and found.of == manifest.id else None


def _recipe(plan: Plan) -> tuple[Recipe, dict[Site, Linear]]:
    model, found = outline(plan.model)
    linears = linears_of(model, found, plan.cut.span(len(found.blocks)))
    return make_recipe(plan.method, plan.cut, len(found.blocks), plan.keep, plan.bits, linears), linears


def _pair(plan: Plan, recipe: Recipe) -> Pair:
    model, found = load_whole(plan.model, torch.float32)
    model.to(plan.device)
    return Pair.of(model, found, recipe)


def _to_cpu(pair: Pair) -> None:
    for model in (pair.model, pair.twin):
        model.cpu()


def _finished(
    out: Path, made_of: str, key: Ed25519PrivateKey | None, resume: bool
) -> tuple[bundle.Manifest, Emulator] | None:
    """What stands in `out`, if it is this very build; None if nothing stands there."""
    if is_free(out):
        return None
    try:
        manifest = bundle.verify(out, None if key is None else key.public_key())
        if manifest.about.get("made_of") == made_of:
            return manifest, Emulator.load(out)
    except BundleError as error:
        if resume:
            raise UsageError(f"{out} holds something else or is damaged ({reason_of(error)}); remove it") from None
    refuse_taken(out)
    return None


def _distance(pair: Pair, texts: Texts, console: Console, costs: Costs) -> Distance | None:
    text = texts.measured
    return None if text is None else measure(pair, text.held_out, text.digest, console, costs)


def _distil(
    pair: Pair, plan: Plan, texts: Texts, unfinished: Unfinished, resume: bool, console: Console, costs: Costs
) -> Distillation | None:
    settings, text, learnt = plan.distillation, texts.measured, texts.distilled
    if settings is None or text is None or learnt is None:
        return None
    quiet = Console(quiet=True)
    before = measure(pair, text.held_out, text.digest, console, costs)
    known = [] if unfinished.has_checkpoint else [before]  # a curve that begins asks first for what was just measured

    def held_out() -> Distance:
        return known.pop() if known else measure(pair, text.held_out, text.digest, quiet, costs)

    unfinished.begin()
    costs.keep_in(unfinished.folder)
    curve = distil(pair, learnt.rows, settings, unfinished.folder, resume, console, held_out, costs)
    return Distillation(
        text=learnt.digest,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=settings.seed,
        before=before,
        curve=curve,
    )


@torch.no_grad()
def _round(pair: Pair, dtype: torch.dtype) -> None:
    """Give the emulator the values that it is saved with, so that what is measured is what is shipped."""
    shared = {id(parameter) for parameter in pair.model.parameters()}
    for number in pair.recipe.kept:
        for parameter in pair.twin_found.blocks[number].parameters():
            if id(parameter) not in shared:
                parameter.copy_(parameter.to(dtype))


def _kept(unfinished: Unfinished) -> str:
    """What a refusal of the emulator says of its distillation."""
    if not unfinished.folder.exists():
        return ""
    return (
        f"; its distillation is kept in {unfinished.folder}: go on with --resume and a lower --minimum-gap, or remove "
        "that folder before you build with other settings"
    )
