"""Whatever is not plain LoRA or weights of the ends' blocks is refused in one line that says why; nothing is left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emulator.tuned_ends import check
from isthmus import bundle
from isthmus.errors import BundleError
from tests.emulator.adapters import KEY, outline, plugged, saved

Spoil = Callable[[Path], object]


def settings(**changes: object) -> Callable[[Path], None]:
    """Change what adapter_config.json says."""

    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    """Change the weights' file; `change` also gets the name of the first tensor."""

    def apply(adapter: Path) -> None:
        path = next(adapter.glob("*.safetensors"))
        values = load_file(path)
        change(values, min(values))
        save_file(values, path)

    return apply


def truncated(adapter: Path) -> None:
    path = next(adapter.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


def swollen(adapter: Path) -> None:
    with next(adapter.glob("*.safetensors")).open("r+b") as file:
        file.truncate(1 << 34)  # sparse


def linked(adapter: Path) -> None:
    path = next(adapter.glob("*.safetensors"))
    path.rename(adapter.parent / "elsewhere.safetensors")
    path.symlink_to(adapter.parent / "elsewhere.safetensors")


def one_more(values: dict[str, torch.Tensor], name: str) -> None:
    values[name.replace(".0.", ".3.")] = values[name].clone()


def wider(values: dict[str, torch.Tensor], name: str) -> None:
    values[name] = torch.zeros(values[name].shape[0], values[name].shape[1] + 1)


def not_a_number(values: dict[str, torch.Tensor], name: str) -> None:
    values[name].view(-1)[0] = float("nan")


def whole_numbers(values: dict[str, torch.Tensor], name: str) -> None:
    values[name] = values[name].to(torch.int32)


def huge(values: dict[str, torch.Tensor], _: str) -> None:
    for value in values.values():
        value.fill_(1e30)


SPAN, EMBEDDING = "model.layers.9.self_attn.q_proj", "model.embed_tokens"
LORA_REFUSALS: dict[str, tuple[Spoil, str]] = {
    "truncated": (truncated, "cannot be read"),
    "too large": (swollen, "no adapter of this model"),
    "link": (linked, "cannot be read"),
    "unknown name": (tensors(one_more), "no part of tuned ends"),
    "missing name": (tensors(lambda values, name: values.pop(name)), "lacks"),
    "nothing": (tensors(lambda values, _: values.clear()), "lacks"),
    "shape": (tensors(wider), "where the model needs"),
    "dtype": (tensors(whole_numbers), "stored as I32"),
    "nan": (tensors(not_a_number), "holds values that are not finite"),
    "infinite once merged": (tensors(huge), "not finite with the adapter"),
    "no settings": (lambda adapter: (adapter / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "settings too large": (settings(peft_version="x" * (1 << 20)), "over"),
    "auto_mapping": (
        settings(auto_mapping={"parent_library": "evil"}),
        "'auto_mapping' is set",
    ),
    "modules_to_save": (settings(modules_to_save=["lm_head"]), "'modules_to_save' is set"),
    "layer_replication": (settings(layer_replication=[[0, 6], [2, 4]]), "'layer_replication' is set"),
    "revision": (settings(revision="main"), "'revision' is set"),
    "dora": (settings(use_dora=True), "'use_dora' is set"),
    "rslora": (settings(use_rslora=True), "'use_rslora' is set"),
    "alpha_pattern": (settings(alpha_pattern={"q_proj": 1.0}), "'alpha_pattern' is set"),
    "unheard of": (settings(unheard_of="x"), "'unheard_of' is set"),
    "bias": (settings(bias="all"), "bias"),
    "init": (settings(init_lora_weights="pissa"), "init_lora_weights"),
    "megatron": (settings(megatron_core="evil.module"), "megatron_core"),
    "other method": (settings(peft_type="IA3"), "peft_type"),
    "pattern": (settings(target_modules=".*"), "target_modules"),
    "all-linear": (settings(target_modules="all-linear"), "target_modules"),
    "part of a name": (settings(target_modules=["q_proj"]), "'q_proj', which is no linear module"),
    "target outside": (settings(target_modules=[SPAN]), "which is no linear module"),
    "embedding": (settings(target_modules=[EMBEDDING]), "which is no linear module"),
    "rank": (settings(r=10**9), "rank 1000000000"),
    "other rank": (settings(r=5), "where the model needs"),
    "alpha": (settings(lora_alpha=float("inf")), "lora_alpha"),
}


def refused(model: Path, adapter: Path, out: Path, why: str) -> None:
    """One line that says why; nothing is left."""
    with pytest.raises(BundleError) as caught:
        plugged(model, adapter, out)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(".out-*"))


@pytest.mark.parametrize("name", LORA_REFUSALS)
def test_what_is_not_plain_lora_on_the_models_own_modules_is_refused_with_the_reason(
    tiny_models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    spoil, why = LORA_REFUSALS[name]
    adapter = saved(tiny_models["llama"], tmp_path / "adapter", "1:1")
    spoil(adapter)
    refused(tiny_models["llama"], adapter, tmp_path / "out", why)


def manifest(kind: str = "adapter", digest: str | None = None, cut: str = "1:1", method: str = "full") -> Spoil:
    """Sign other words over the same files."""

    def write(adapter: Path) -> None:
        old = bundle.verify(adapter, None)
        bundle.write(adapter, kind, digest or old.model_digest, cut, {"method": method}, KEY)  # type: ignore[arg-type]

    return write


def flipped(adapter: Path) -> None:
    path = next(adapter.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def signed_again(spoil: Spoil) -> Spoil:
    """Change the files, and sign what they are now."""

    def apply(adapter: Path) -> None:
        old = bundle.verify(adapter, None)
        spoil(adapter)
        bundle.write(adapter, "adapter", old.model_digest, old.cut, old.about, KEY)

    return apply


def head_too(values: dict[str, torch.Tensor], _: str) -> None:
    values["lm_head.weight"] = torch.zeros(259, 32)


OWN_REFUSALS: dict[str, tuple[Spoil, str]] = {
    "tampered": (flipped, "not what its hash says"),
    "truncated": (truncated, "bytes, not"),
    "truncated and signed": (signed_again(truncated), "cannot be read"),
    "too large": (swollen, "no adapter of this model"),
    "other base": (manifest(digest="0" * 64), "was tuned on model 000000000000"),
    "other kind": (manifest(kind="ends"), "is a bundle of ends"),
    "side network": (manifest(method="side"), "side network"),
    "unknown method": (manifest(method="prefix"), "'prefix'"),
    "biases alone": (manifest(method="bitfit"), "no part of tuned ends"),
    "other blocks": (manifest(cut="1:0"), "no part of tuned ends"),
    "no span": (manifest(cut="3:3"), "for another model"),
    "outside the blocks": (signed_again(tensors(head_too)), "'lm_head.weight', which is no part"),
    "shape": (signed_again(tensors(lambda v, name: v.update({name: torch.zeros(7, 7)}))), "where the model needs"),
    "nan": (signed_again(tensors(not_a_number)), "holds values that are not finite"),
    "no manifest": (lambda adapter: (adapter / bundle.MANIFEST).unlink(), "has no manifest.json"),
    "unlisted": (lambda adapter: (adapter / "more.json").write_text("{}"), "not listed"),
    "both formats": (
        lambda adapter: shutil.copy(adapter / "adapter.safetensors", adapter / "adapter_model.safetensors"),
        "holds both",
    ),
    "no weights": (lambda adapter: (adapter / "adapter.safetensors").unlink(), "holds neither"),
    "no folder": (lambda adapter: shutil.rmtree(adapter), "cannot be read"),
}


@pytest.mark.parametrize("name", OWN_REFUSALS)
def test_what_is_not_weights_of_the_ends_blocks_is_refused_with_the_reason(
    tiny_models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    spoil, why = OWN_REFUSALS[name]
    adapter = saved(tiny_models["llama"], tmp_path / "adapter", "1:1", "full")
    spoil(adapter)
    refused(tiny_models["llama"], adapter, tmp_path / "out", why)


def test_no_tensor_is_read_of_a_file_whose_header_does_not_fit(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(tiny_models["llama"], tmp_path / "adapter", "1:1")
    tensors(wider)(adapter)
    read: list[str] = []

    class Watched:
        def __init__(self, *given: object, **named: object) -> None:
            self.file = safe_open(*given, **named)

        def __enter__(self) -> "Watched":
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> object:
            read.append(name)
            return getattr(self.file, name)

    monkeypatch.setattr("emulator.tuned_ends.safe_open", Watched)
    with pytest.raises(BundleError, match="where the model needs"):
        check(adapter, outline(tiny_models["llama"]))
    assert set(read) == {"keys", "get_slice"}
