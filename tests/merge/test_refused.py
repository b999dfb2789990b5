"""Whatever a stranger's adapter holds that is not an adapter of this model is refused in one line; nothing is left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import emulator.saving
from emulator.merge_settings import MergeSettings
from emulator.mergeable import REFUSED
from isthmus import bundle
from isthmus.errors import BundleError, UsageError
from tests.emulator.adapters import KEY, submitted, whole
from tests.emulator.test_tuned_ends_refused import linked, not_a_number, settings, swollen, tensors, truncated, wider
from tests.merge.adapters import made, merged, named

Spoil = Callable[[Path], object]
SLOW = "(.*.*)*x"


@pytest.fixture
def adapter(tiny_models: dict[str, Path], tmp_path: Path, plain: Path) -> Path:
    """A good one, to be spoilt."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def plain(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tiny_models["llama"], tmp_path_factory.mktemp("plain") / "adapter", named("ends of names"), "llama")


def refused(model: Path, adapter: Path, out: Path, why: str) -> None:
    with pytest.raises(BundleError) as caught:
        merged(model, adapter, out)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert not out.exists()
    assert not list(out.parent.glob(".out-*"))


def written(text: str) -> Spoil:
    return lambda adapter: (adapter / "adapter_config.json").write_text(text)


def not_in_order(values: dict[str, torch.Tensor], name: str) -> None:
    values["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32)


def huge(values: dict[str, torch.Tensor], _: str) -> None:
    for value in values.values():
        value.fill_(1e30)


def large(values: dict[str, torch.Tensor], _: str) -> None:
    for value in values.values():
        value.fill_(1e18)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "megatron": ({"megatron_core": "evil.module"}, "megatron_core is 'evil.module'"),
    "megatron's settings": ({"megatron_config": {"tensor_model_parallel_size": 2}}, "'megatron_config' is set"),
    "replication": ({"layer_replication": [[0, 6], [2, 4]]}, "'layer_replication' is set"),
    "parameters": ({"target_parameters": ["mlp.experts"]}, "'target_parameters' is set"),
    "tying": ({"ensure_weight_tying": True}, "'ensure_weight_tying' is set"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "'alora_invocation_tokens' is set"),
    "quantised": ({"use_qalora": True}, "'use_qalora' is set"),
    "mixed": ({"arrow_config": {"top_k": 3}}, "'arrow_config' is set"),
    "unheard of": ({"unheard_of": "x"}, "'unheard_of' is set"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "task": ({"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS'"),
    "classifier": ({"task_type": "SEQ_CLS"}, "the adapter holds no head"),
    "bias": ({"bias": "some"}, "bias is 'some'"),
    "pattern": ({"target_modules": SLOW}, "a pattern"),
    "pattern in a list": ({"target_modules": ["q_proj", SLOW]}, "which is no name of a module"),
    "pattern to exclude": ({"exclude_modules": SLOW}, "a pattern"),
    "pattern of layers": ({"layers_to_transform": [1], "layers_pattern": SLOW}, "which is no name of a module"),
    "pattern of ranks": ({"rank_pattern": {SLOW: 4}}, "which is no name of a module"),
    "pattern of modules": ({"modules_to_save": SLOW}, "a pattern"),
    "nowhere": ({"target_modules": ["query"]}, "names no module of this model"),
    "modules in one another": ({"modules_to_save": ["layers.1", "layers.1.mlp"]}, "and what it is in"),
    "rank": ({"r": 10**9}, "says r 1000000000"),
    "rank of a module": ({"rank_pattern": {"q_proj": 10**9}}, "says rank_pattern 1000000000"),
    "rank beyond numbers": ({"r": 10**400}, "r is 1000"),
    "rank below": ({"r": -1}, "r is -1"),
    "ranks of more than there is": ({"rank_pattern": {f"m{number}": 8 for number in range(65)}}, "of 65 modules"),
    "lists of blocks": ({"layers_to_transform": [1], "layers_pattern": ["h"] * 65}, "more lists of blocks"),
    "rank of none": ({"r": 0}, "peft cannot merge"),
    "other rank": ({"r": 5}, "where the model needs"),
    "rank as text": ({"r": "8"}, "r is '8'"),
    "rank as truth": ({"r": True}, "r is True"),
    "alpha": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "not a flag": ({"use_dora": "yes"}, "use_dora is 'yes'"),
    "more of a method": ({"use_dora": True}, "lacks"),
    "rows": ({"trainable_token_indices": [259]}, "not all of the embedding's 259"),
    "rows twice": ({"trainable_token_indices": [3, 3]}, "twice"),
    "rows of elsewhere": ({"trainable_token_indices": {"lm_head": [3]}}, "rows of other modules"),
    "rows and all": ({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "besides"),
    "no method": ({"peft_type": ["LORA"]}, "is no method that is merged here"),
    "unheard-of method": ({"peft_type": "__class__"}, "'__class__' is no method"),
    "another method": ({"peft_type": "IA3"}, "is set, which cannot be merged"),
}
FILES: dict[str, tuple[Spoil, str]] = {
    "no settings": (lambda adapter: (adapter / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "settings too large": (settings(peft_version="x" * (1 << 20)), "is over"),
    "no json": (written("{'r': 8}"), "holds no settings that can be read"),
    "deep json": (written("[" * 100_000), "holds no settings that can be read"),
    "a list": (written("[]"), "holds no settings that can be read"),
    "linked settings": (
        lambda adapter: (
            (adapter / "adapter_config.json").rename(adapter / "elsewhere.json"),
            (adapter / "adapter_config.json").symlink_to("elsewhere.json"),
        ),
        "cannot be read",
    ),
    "link": (linked, "cannot be read"),
    "truncated": (truncated, "cannot be read"),
    "too large": (swollen, "no adapter of this model"),
    "missing": (tensors(lambda values, name: values.pop(name)), "lacks"),
    "nothing": (tensors(lambda values, _: values.clear()), "lacks"),
    "foreign": (tensors(not_in_order), "no part of"),
    "shape": (tensors(wider), "where the model needs"),
    "dtype": (tensors(lambda v, name: v.update({name: v[name].to(torch.int32)})), "stored as I32"),
    "nan": (tensors(not_a_number), "holds values that are not finite"),
    "infinite once merged": (tensors(huge), "not finite with the adapter"),
    "infinite once run": (tensors(large), "is not finite"),
    "no weights": (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "holds neither"),
    "no folder": (shutil.rmtree, "cannot be read"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_no_merge_can_keep_or_that_would_run_something_are_refused_by_name(
    name: str, adapter: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    changes, why = SETTINGS[name]
    settings(**changes)(adapter)
    refused(tiny_models["llama"], adapter, tmp_path / "out", why)


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_those_of_an_adapter_of_this_model_are_refused(
    name: str, adapter: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    spoil, why = FILES[name]
    spoil(adapter)
    refused(tiny_models["llama"], adapter, tmp_path / "out", why)


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_leaves_no_weights_to_merge_is_refused_with_what_to_do_instead(
    method: str, adapter: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    settings(peft_type=method)(adapter)
    refused(tiny_models["llama"], adapter, tmp_path / "out", f"{method} cannot be merged: it ")


def test_modules_that_peft_does_not_take_for_a_method_are_refused_with_its_reason(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = made(tiny_models["llama"], tmp_path / "adapter", named("loha"), "llama")
    settings(target_modules=["c_attn"])(adapter)
    refused(tiny_models["gpt2"], adapter, tmp_path / "out", "peft cannot merge this loha into the model (Target module")


@pytest.mark.parametrize(
    ("method", "field", "most"),
    [("oft", "num_cayley_neumann_terms", 64), ("boft", "boft_n_butterfly_factor", 64), ("hra", "r", 256)],
)
def test_steps_that_are_work_whatever_the_tensors_size_are_capped(
    method: str, field: str, most: int, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = made(tiny_models["llama"], tmp_path / "adapter", named(method), "llama")
    settings(**{field: most + 1})(adapter)
    refused(tiny_models["llama"], adapter, tmp_path / "out", f"{field} is {most + 1}, and may be 0 to {most}")
    settings(**{field: most})(adapter)
    assert MergeSettings.load(adapter).told[field] == most


def test_what_is_harmless_after_training_never_reaches_peft(
    adapter: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        base_model_name_or_path="/etc/passwd",
        revision="evil",
        runtime_config={"ephemeral_gpu_offload": True},
        init_lora_weights="orthogonal",
        loftq_config={"loftq_bits": 4},
        eva_config={"rho": 2.0},
        lora_dropout=0.5,
    )(adapter)
    told: dict[str, Any] = {}

    class Watched(peft.LoraConfig):
        def __init__(self, **given: Any) -> None:
            told.update(given)
            super().__init__(**given)

    monkeypatch.setattr(peft, "LoraConfig", Watched)
    merged(tiny_models["llama"], adapter, tmp_path / "out")
    fields = {"r", "lora_alpha", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "lora_bias"}
    assert told.keys() == fields | {"target_modules", "rank_pattern", "alpha_pattern"}
    assert set(told["target_modules"]) == {
        f"model.layers.{number}.self_attn.{last}" for number in range(6) for last in ("q_proj", "v_proj")
    }


def test_no_weight_of_the_model_is_read_for_an_adapter_that_is_refused(
    adapter: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors(wider)(adapter)
    monkeypatch.setattr(emulator.saving, "load_trimmed", lambda *_: pytest.fail("the model was loaded"))
    refused(tiny_models["llama"], adapter, tmp_path / "out", "where the model needs")


def test_an_adapter_of_another_model_is_refused(adapter: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    refused(tiny_models["gpt2"], adapter, tmp_path / "out", "names no module of this model")
    other = tmp_path / "other"
    model = whole(tiny_models["llama"])
    model.lm_head.weight.data += 0.1
    model.save_pretrained(other)
    signed = submitted(tiny_models["llama"], tmp_path / "signed")
    refused(other, signed, tmp_path / "out", "was tuned on model")
    (signed / "adapter_model.safetensors").write_bytes(b"x")
    refused(tiny_models["llama"], signed, tmp_path / "out", "has 1 bytes, not")


def test_a_manifest_binds_what_was_adapted_to_the_ends(
    adapter: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    signed = submitted(tiny_models["llama"], tmp_path / "signed", "2:2")
    digest = bundle.verify(signed, None).model_digest
    for name in ("manifest.json", "manifest.sig"):
        (signed / name).unlink()
    (adapter / "README.md").unlink(missing_ok=True)
    bundle.write(adapter, "adapter", digest, "1:1", {"method": "lora"}, KEY)
    refused(tiny_models["llama"], adapter, tmp_path / "out", "which is in the span of cut 1:1")


def test_a_folder_that_holds_something_is_never_written_to(
    adapter: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something"):
        merged(tiny_models["llama"], adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_merge_that_is_stopped_leaves_nothing(
    adapter: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", stop)
    with pytest.raises(KeyboardInterrupt):
        merged(tiny_models["llama"], adapter, tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())


def test_the_same_names_in_another_rank_pattern_of_adalora_are_refused(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = made(tiny_models["llama"], tmp_path / "adapter", named("adalora"), "llama")
    name = "model.layers.0.self_attn.q_proj.lora_E"
    for kept, why in (
        ({name: [True]}, "other ranks"),
        ({"elsewhere.lora_E": [True] * 6}, "other ranks"),
        ({name: 6}, "rank_pattern holds 6"),
        ([name], "rank_pattern is"),
    ):
        settings(rank_pattern=kept)(adapter)
        refused(tiny_models["llama"], adapter, tmp_path / "out", why)
    settings(rank_pattern={name: [True] * 5 + [False]})(adapter)
    refused(tiny_models["llama"], adapter, tmp_path / "out", "where the model needs")
    values = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.lora_E')}"
    for matrix, axis in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
        values[f"{stem}.{matrix}"] = values[f"{stem}.{matrix}"].narrow(axis, 0, 5).contiguous()
    save_file(values, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    merged(tiny_models["llama"], adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "plugged_in.json").read_text())["adapter"] is None
