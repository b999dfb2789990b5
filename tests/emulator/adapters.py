"""What edges save and submit, of ends that were never trained, and the models that it is plugged into.

Knows tiny models, adapters' folders and one merge; says nothing of what should come of it.
"""

import io
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from edge_client.adapter_folder import save_adapter
from edge_client.attaching import Placement, attach
from emulator.changes import Changed
from emulator.outline import Outline
from emulator.plug_in import plug_in
from emulator.tuned_ends import TunedEnds, check
from isthmus import bundle
from isthmus.cut import Cut
from isthmus.load import load_ends, model_digest

EXACT = 1e-5
"""Norm of the difference over the norm: what merging in float32 may round."""

KEY = Ed25519PrivateKey.generate()
"""Of the edge."""


def saved(model: Path, place: Path, cut: str, kind: str = "lora", targets: list[str] | None = None) -> Path:
    """What an edge saves, with values that matter, of ends that were never trained."""
    ends, found = load_ends(model, Cut.parse(cut), torch.float32)
    tuning = attach(ends, found, Cut.parse(cut), Placement(kind, 4, 8.0, targets, seed=0))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.zeros_like(value) if kind == "lora" else value for name, value in tuning.values().items()}
    tuning.load({name: v + 0.1 * torch.randn(v.shape, generator=generator) for name, v in start.items()})
    save_adapter(tuning, place, model.name, model_digest(model), Cut.parse(cut), KEY)
    return place


def submitted(model: Path, place: Path, cut: str = "1:1", said: str | None = None, **about: str) -> Path:
    """An adapter of a cut in peft's format, under a signed manifest, which may say another."""
    saved(model, place, cut)
    bundle.write(place, "adapter", model_digest(model), said or cut, {"method": "lora", **about}, KEY)
    return place


def plugged(model: Path, adapter: Path, out: Path) -> tuple[TunedEnds, Changed, PreTrainedModel]:
    tuned = check(adapter, outline(model))
    changed = plug_in(tuned, model, out, Console(file=io.StringIO()))
    return tuned, changed, whole(out)


def outline(model: Path) -> Outline:
    return Outline.of(model, model_digest(model))


def whole(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory).requires_grad_(False).eval()


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))
