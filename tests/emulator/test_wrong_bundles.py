"""An emulator of another model, of another shape or changed since it was signed is refused with the reason."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from emulator.build import Plan, build
from emulator.package import open_pair
from isthmus import bundle
from isthmus.cut import Cut
from isthmus.emulated.load import load_emulated
from isthmus.errors import BundleError, ModelError
from isthmus.load import load_ends, load_whole, outline
from tests.emulator.conftest import CUT, QUIET, Make, logits

UP = "model.layers.2.mlp.up_proj"
EMBEDDING = "model.embed_tokens.weight"


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
        open_pair(tmp_path / "out", homes["gpt2"], torch.device("cpu"))


def test_a_bundle_of_another_kind_or_a_changed_file_is_refused(
    make: Make, homes: dict[str, Path], tmp_path: Path
) -> None:
    make(tmp_path / "out", method="drop", keep=2)
    resigned(tmp_path / "out", kind="ends")
    with pytest.raises(BundleError, match="holds ends, not an emulator"):
        open_pair(tmp_path / "out", homes["llama"], torch.device("cpu"))
    resigned(tmp_path / "out", kind="emulator")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(BundleError, match=r"model.safetensors is not what its hash says"):
        open_pair(tmp_path / "out", homes["llama"], torch.device("cpu"))


def test_weights_of_the_wrong_shape_are_refused_by_name(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "out", method="rank", keep=0.5)
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    name = "model.layers.2.mlp.up_proj.down.weight"
    stored[name] = stored[name][1:].contiguous()
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(BundleError, match=rf"{name} is \[9, 32\] where the recipe needs \[10, 32\]"):
        load_emulated(tmp_path / "out", torch.float32)


@pytest.fixture(scope="module")
def built(homes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "quantised"
    build(Plan(homes["llama"], CUT, "quant", bits=4), folder, None, False, QUIET)
    return folder


@pytest.fixture
def quantised(built: Path, tmp_path: Path) -> Path:
    """An emulator of 4 bits a weight, to spoil."""
    return Path(shutil.copytree(built, tmp_path / "quantised"))


def with_tensors(
    folder: Path, changes: dict[str, Callable[[torch.Tensor], torch.Tensor] | torch.Tensor | None]
) -> None:
    """Give an emulator other tensors, leave out those that are None, and sign it anew."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name, change in changes.items():
        made = change(stored[name]) if callable(change) else change
        stored = {other: tensor for other, tensor in stored.items() if other != name}
        if made is not None:
            stored[name] = made
    save_file(stored, path, metadata={"format": "pt"})
    resigned(folder)


def holding(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return put


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.9.more", torch.zeros(2), "'{}' is no weight of the model with this recipe"),
        (UP + ".weight", torch.zeros(64, 32), "'{}' is no weight of the model with this recipe"),
        (UP + ".scale", None, "{} is not there, which the recipe needs"),
        (EMBEDDING, None, "{} is not there, which the recipe needs"),
        (UP + ".codes", torch.Tensor.float, "{} is stored as F32 where the recipe needs U8"),
        (UP + ".codes", torch.Tensor.long, "{} is stored as I64 where the recipe needs U8"),
        (UP + ".codes", torch.Tensor.char, "{} is stored as I8 where the recipe needs U8"),
        (UP + ".codes", lambda codes: codes[:, 1:].contiguous(), r"{} is \[64, 31\] where the recipe needs \[64, 32\]"),
        (EMBEDDING, torch.Tensor.byte, "{} is stored as U8 where the recipe needs F64 or F32 or F16 or BF16"),
        (EMBEDDING, holding(float("nan")), "{} holds values that are not finite"),
        (UP + ".scale", holding(float("inf")), "{} holds values that are not finite"),
        ("model.norm.weight", holding(float("-inf")), "{} holds values that are not finite"),
    ],
)
def test_tensors_that_are_not_exactly_the_models_are_refused_by_name(
    name: str, change: Any, message: str, quantised: Path
) -> None:
    with_tensors(quantised, {name: change})
    with pytest.raises(BundleError, match=f"{message.format(re.escape(name))}: have it built anew") as caught:
        load_emulated(quantised, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_value_beyond_the_type_that_is_computed_in_is_refused(quantised: Path) -> None:
    with_tensors(quantised, {EMBEDDING: lambda weight: holding(1e300)(weight.double())})
    with pytest.raises(BundleError, match=f"{EMBEDDING} holds values that are not finite"):
        load_emulated(quantised, torch.float32)


def test_no_tensor_is_read_of_a_file_that_holds_anything_else(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)
    with_tensors(quantised, {UP + ".codes": torch.Tensor.float})
    with pytest.raises(BundleError, match="is stored as F32"):
        load_emulated(quantised, torch.float32)


def with_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_configuration_that_names_other_weights_or_an_adapter_beside_them_changes_nothing(quantised: Path) -> None:
    honest = logits(load_emulated(quantised, torch.float32).model)
    stored = load_file(quantised / "model.safetensors")
    save_file({**stored, EMBEDDING: -stored[EMBEDDING]}, quantised / "other.safetensors", metadata={"format": "pt"})
    with_config(quantised, {"transformers_weights": "other.safetensors"})
    resigned(quantised)
    assert torch.equal(logits(load_emulated(quantised, torch.float32).model), honest)
    (quantised / "adapter_config.json").write_text("{}")
    resigned(quantised)
    with pytest.raises(ModelError, match=r"holds adapter_config.json, which is no part"):
        load_emulated(quantised, torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"hidden_size": "wide"},
        {"vocab_size": -5},
        {"hidden_act": "nothing"},
        {"rope_parameters": {"rope_type": "nothing", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear"}},
        {"layer_types": 7},
        {"dtype": "complex"},
        {"model_type": "nothing"},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_refused_in_one_line(changes: dict[str, Any], quantised: Path) -> None:
    with_config(quantised, changes)
    resigned(quantised)
    with pytest.raises((BundleError, ModelError)) as caught:
        load_emulated(quantised, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_plain_model_is_refused_likewise_with_the_weight_and_both_shapes(
    homes: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(homes["llama"], tmp_path / "model")
    with_config(tmp_path / "model", {"intermediate_size": 48})
    for load in (load_whole, partial(load_ends, cut=Cut(1, 1))):
        with pytest.raises(ModelError, match=r"down_proj.weight as \[32, 64\] where its config.json needs \[32, 48\]"):
            load(tmp_path / "model", dtype=torch.float32)
    with_config(tmp_path / "model", {"num_key_value_heads": 0})
    for load in (load_whole, partial(load_ends, cut=Cut(1, 1)), lambda folder, dtype: outline(folder)):
        with pytest.raises(ModelError, match=r"cannot be loaded \(ZeroDivisionError: .*; save or fetch the model anew"):
            load(tmp_path / "model", dtype=torch.float32)


@pytest.mark.parametrize(
    "ask", [lambda: torch.empty(1 << 50, dtype=torch.uint8), lambda: bytearray(1 << 60)], ids=["torch", "python"]
)
def test_too_little_memory_is_not_blamed_on_the_files(
    ask: Callable[[], object], homes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: ask())
    with pytest.raises(ModelError, match="cannot be loaded: it takes more memory than is left here") as caught:
        load_whole(homes["llama"], torch.float32)
    assert "anew" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [1, None, 3]}, "stands for 3 blocks, and the model's span has 4"),
        ({"ranks": {"mlp.nothing": 4}}, "factors of mlp.nothing, which is no linear module"),
        ({"ranks": {"mlp.down_proj": 33}}, "factors of mlp.down_proj are wider than the module"),
        ({"blocks": [1, None, None, 5]}, "block 5 is used and does not stand at its own place"),
        ({"ranks": {"mlp.down_proj": 4}}, "'model.layers.1.mlp.down_proj.weight' is no weight of the model"),
        ({"blocks": [1, 2, None, 4]}, r"model.layers.2.input_layernorm.weight is not there"),
    ],
)
def test_a_recipe_of_the_wrong_shape_is_refused_with_the_reason(
    changes: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    make(tmp_path / "out", method="drop", keep=2)
    rewritten(tmp_path / "out", **changes)
    with pytest.raises((BundleError, ModelError), match=message):
        load_emulated(tmp_path / "out", torch.float32)
