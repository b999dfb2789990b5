"""An emulator of another model, of another shape or changed since it was signed is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file

from emulator.package import open_pair
from isthmus import bundle
from isthmus.emulated.load import load_emulated
from isthmus.errors import BundleError, ModelError
from tests.emulator.conftest import Make


def resigned(folder: Path, **fields: Any) -> None:
    """Sign a changed folder anew, as whoever built it wrongly would."""
    manifest = bundle.Manifest.parse((folder / bundle.MANIFEST).read_bytes())
    told = {"kind": manifest.kind, "model_digest": manifest.model_digest, "cut": manifest.cut, **fields}
    bundle.write(folder, about=manifest.about, key=Ed25519PrivateKey.generate(), **told)


def rewritten(folder: Path, **changes: Any) -> None:
    about = json.loads((folder / "emulator.json").read_text())
    about["recipe"] |= changes
    (folder / "emulator.json").write_text(json.dumps(about))
    resigned(folder)


def test_an_emulator_of_another_model_is_refused_with_both_digests(
    make: Make, homes: dict[str, Path], tmp_path: Path
) -> None:
    digest = make(tmp_path / "out", method="drop", keep=2).manifest.model_digest
    with pytest.raises(BundleError, match=f"is an emulator of the model {digest[:16]}, and .* name the model"):
        open_pair(tmp_path / "out", homes["gpt2"])


def test_a_bundle_of_another_kind_or_a_changed_file_is_refused(
    make: Make, homes: dict[str, Path], tmp_path: Path
) -> None:
    make(tmp_path / "out", method="drop", keep=2)
    resigned(tmp_path / "out", kind="ends")
    with pytest.raises(BundleError, match="holds ends, not an emulator"):
        open_pair(tmp_path / "out", homes["llama"])
    resigned(tmp_path / "out", kind="emulator")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(BundleError, match=r"model.safetensors is not what its hash says"):
        open_pair(tmp_path / "out", homes["llama"])


def test_weights_of_the_wrong_shape_are_refused_by_name(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "out", method="rank", keep=0.5)
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    name = "model.layers.2.mlp.up_proj.down.weight"
    stored[name] = stored[name][1:].contiguous()
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(BundleError, match=rf"{name} is \[9, 32\] where the recipe needs \[10, 32\]"):
        load_emulated(tmp_path / "out", torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [1, None, 3]}, "stands for 3 blocks, and the model's span has 4"),
        ({"ranks": {"mlp.nothing": 4}}, "factors of mlp.nothing, which is no linear module"),
        ({"ranks": {"mlp.down_proj": 33}}, "factors of mlp.down_proj are wider than the module"),
        ({"blocks": [1, None, None, 5]}, "block 5 is used and does not stand at its own place"),
        ({"ranks": {"mlp.down_proj": 4}}, "lacks .* weights of this side"),
        ({"blocks": [1, 2, None, 4]}, "lacks .* weights of this side"),
    ],
)
def test_a_recipe_of_the_wrong_shape_is_refused_with_the_reason(
    changes: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    make(tmp_path / "out", method="drop", keep=2)
    rewritten(tmp_path / "out", **changes)
    with pytest.raises((BundleError, ModelError), match=message):
        load_emulated(tmp_path / "out", torch.float32)
