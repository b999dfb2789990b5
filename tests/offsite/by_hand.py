"""Emulators and runs made by hand, small and quick, so that nothing here waits for a build or a training."""

from collections.abc import Mapping
from pathlib import Path

import peft
import torch
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file

from isthmus import bundle
from isthmus.adapter_files import PEFT_WEIGHTS
from isthmus.bundle import Kind, Manifest
from isthmus.emulated.load import shape_span
from isthmus.emulated.recipe import Emulator, Recipe
from isthmus.load import load_whole, model_digest
from isthmus.weights import save_weights
from tests.report.example import report

BLOCKS: Mapping[str, tuple[int | None, ...]] = {
    "1:1": (1, None, None, 4),
    "2:1": (2, None, 4),
    "2:0": (2, None, None, 5),
}

MIB = 1 << 20


def make_emulator(folder: Path, model: Path, cut: str, key: Ed25519PrivateKey, padding: int = 0) -> Manifest:
    """A `drop` emulator of a tiny model of 6 blocks; `padding` bytes in a further file make it larger."""
    whole, found = load_whole(model, torch.float32)
    recipe = Recipe(method="drop", cut=cut, blocks=BLOCKS[cut])
    shape_span(found, recipe)
    folder.mkdir(parents=True)
    save_weights(whole, model, folder)
    describe(recipe).save(folder)
    if padding:
        (folder / "padding.txt").write_bytes(bytes(padding))
    return bundle.write(folder, "emulator", model_digest(model), cut, {"method": "drop"}, key)


def describe(recipe: Recipe) -> Emulator:
    """An `emulator.json` whose figures are of nothing."""
    return Emulator(
        recipe=recipe, parameters=1, span_parameters=2, weight_bytes=4, flops_per_token=2, span_flops_per_token=4
    )


def resign(folder: Path, key: Ed25519PrivateKey, kind: Kind | None = None, digest: str | None = None) -> Manifest:
    """Write a bundle's manifest and signature anew, saying something else."""
    old = Manifest.parse((folder / "manifest.json").read_bytes())
    return bundle.write(folder, kind or old.kind, digest or old.model_digest, old.cut, old.about, key)


def flip(path: Path) -> None:
    """Change one bit in a file's middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_run(run: Path, model: Path, cut: str = "1:1", seed: int = 0, digest: str | None = None) -> Path:
    """A finished run whose LoRA adapter of one module was drawn, not trained."""
    whole, _ = load_whole(model, torch.float32)
    torch.manual_seed(seed)
    name = "model.layers.0.self_attn.q_proj"
    tuned = peft.get_peft_model(whole, peft.LoraConfig(r=2, lora_alpha=4, target_modules=[name], task_type="CAUSAL_LM"))
    tuned.save_pretrained(run / "adapter")
    (run / "adapter" / "README.md").unlink()
    _write_run(run, digest or model_digest(model), cut, "peft", "lora")
    return run


def make_full_run(run: Path, model: Path) -> Path:
    """A finished run that tuned weights of block 0 themselves."""
    whole, _ = load_whole(model, torch.float32)
    weights = {name: value.clone() for name, value in whole.named_parameters() if name.startswith("model.layers.0.")}
    (run / "adapter").mkdir(parents=True)
    save_file(weights, run / "adapter" / "adapter.safetensors")
    digest = model_digest(model)
    bundle.write(run / "adapter", "adapter", digest, "1:1", {"method": "full", "said": 1}, Ed25519PrivateKey.generate())
    _write_run(run, digest, "1:1", "isthmus", "full")
    return run


def change_weights(run: Path, value: float) -> None:
    """Put a value into the middle of a run's adapter."""
    path = run / "adapter" / PEFT_WEIGHTS
    weights = load_file(path)
    first = min(weights)
    weights[first][0, 0] = value
    save_file(weights, path)


def _write_run(run: Path, digest: str, cut: str, format_: str, kind: str) -> None:
    settings = {"method": "offsite", "emulator": str(run), "data": "rows.jsonl", "peft": kind}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    written = report(cut=cut, model_digest=digest, adapter_format=format_, peft_type=kind)
    written.save(run / "run.json")
