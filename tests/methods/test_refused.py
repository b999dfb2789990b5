"""What a method cannot be told, and a method that a cut model cannot have, is refused by name in one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from edge_client.adapter_folder import load_adapter
from edge_client.assemble import load_local
from edge_client.attaching import attach
from edge_client.cli import main
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel
from edge_client.peft_methods import METHODS, REFUSED, options_of, read_options
from isthmus.errors import BundleError, UsageError
from tests.methods.cases import CASES, CUT, FAMILIES, by_name
from tests.methods.conftest import Run, carry_out


def of_case(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({"method": "local", "model": "m", "cut": CUT, "data": "unused", **settings})


def attached_to(directory: Path, **settings: Any) -> None:
    config = of_case(**{"model": str(directory), **settings})
    edge = load_local(config)
    attach(edge.model, edge.found, edge.cut, config.placement)


def words(given: object) -> str | None:
    return given if isinstance(given, str) else None


def test_every_method_has_a_case_here() -> None:
    assert {case.name for case in CASES} == set(METHODS) - {"side"}  # which has tests of its own


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_method_that_a_cut_model_cannot_have_is_refused_with_the_reason_and_another(name: str) -> None:
    with pytest.raises(ValidationError) as refused:
        of_case(peft=name)
    said = str(refused.value)
    assert f"--peft {name} cannot train a model that is cut: {REFUSED[name]}" in said
    assert any(f"--peft {other}" in REFUSED[name] or f"use {other}" in REFUSED[name] for other in METHODS)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"peft": "magic"}, "--peft magic is no method here; known are lora, "),
    ({"peft": "ia3", "rank": 4}, "--peft ia3 has no rank; leave out --rank"),
    ({"peft": "vera", "alpha": 4}, "--peft vera has no alpha; leave out --alpha"),
    ({"peft": "bitfit", "rank": 4}, "--peft bitfit has no rank"),
    ({"peft": "dora", "dropout": 0.1}, "--dropout goes with --peft lora and rslora"),
    (
        {"peft": "fourierft", "peft_option": {"n": 4}},
        "--peft-option n is none of --peft fourierft: it takes ",
    ),
    ({"peft": "lora", "peft_option": {"r": 4}}, "--peft-option r is none of --peft lora: it takes init_lora_weights"),
    ({"peft": "lora", "peft_option": {"lora_dropout": 0.1}}, "--peft-option lora_dropout is none of"),
    ({"peft": "lora", "peft_option": {"auto_mapping": {}}}, "--peft-option auto_mapping is none of"),
    ({"peft": "lora", "peft_option": {"init_lora_weights": "eva"}}, "init_lora_weights=eva is none of true, false"),
    ({"peft": "full", "peft_option": {"bias": "all"}}, "--peft-option bias is none of --peft full: it takes none"),
    ({"peft": "trainable-tokens"}, "--peft trainable-tokens needs --peft-option token_indices=..."),
]


@pytest.mark.parametrize(("settings", "said"), WRONG, ids=words)
def test_settings_that_a_method_does_not_have_are_refused_not_ignored(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        of_case(**settings)
    assert said in str(refused.value)


FIVE: dict[str, Any] = {"peft_option": {"token_indices": [5]}}
NOT_HERE: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"peft": "prompt", "train": "top"}, "--train top trains nothing below the span, where --peft prompt is"),
    (
        "llama",
        {"peft": "trainable-tokens", "train": "top", "peft_option": {"token_indices": [5]}},
        "--train top trains",
    ),
    ("llama", {"peft": "prompt", "targets": ["q_proj"]}, "--targets goes with --peft lora and its like"),
    ("llama", {"peft": "ln-tuning", "targets": ["q_proj"]}, "target 'q_proj' is no norm of the ends; known are "),
    ("llama", {"peft": "ln-tuning", "train": "top", "cut": "2:0"}, "no norms that could train"),
    ("llama", {"peft": "c3a"}, "peft refuses --peft c3a here: The block size should be a factor"),
    ("llama", {"peft": "adalora", "rank": 8, "peft_option": {"init_r": 8}}, "init_r 8 must be more than --rank 8"),
    (
        "llama",
        {"peft": "trainable-tokens", "peft_option": {"token_indices": [999]}},
        "peft refuses --peft trainable-tokens",
    ),
    ("gpt2", {"peft": "olora"}, "the wrong way round; use --peft pissa or lora"),
]


@pytest.mark.parametrize(
    ("family", "settings", "said"), NOT_HERE, ids=lambda one: one if isinstance(one, str) else None
)
def test_what_does_not_fit_the_model_is_refused_in_one_line(
    family: str, settings: dict[str, Any], said: str, tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(UsageError) as refused:
        attached_to(tiny_models[family], **settings)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "family"), [(case.name, family) for case in CASES for family in FAMILIES if family not in case.families]
)
def test_a_method_that_does_not_take_a_familys_modules_is_refused(
    name: str, family: str, tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(UsageError):
        attached_to(tiny_models[family], peft=name, **by_name(name).settings)


def test_options_are_written_name_equals_value_in_yaml() -> None:
    given = ["token_indices=[5, 6]", "use_dora=true", "mask_type=random", "scaling=1.5"]
    assert read_options(given) == {"token_indices": [5, 6], "use_dora": True, "mask_type": "random", "scaling": 1.5}
    for wrong in (["use_dora"], ["=1"], ["a=1", "a=2"], ["a=["]):
        with pytest.raises(UsageError, match="--peft-option"):
            read_options(wrong)


def test_no_option_says_where_an_adapter_goes_or_names_code_or_files() -> None:
    for name in METHODS:
        told = set(options_of(name))
        assert not told & {
            "target_modules",
            "modules_to_save",
            "auto_mapping",
            "megatron_core",
            "tokenizer_name_or_path",
        }
        assert not [option for option in told if option.endswith(("_config", "dropout"))]


def test_the_command_says_which_options_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["--method", "split", "--server", "h:1", "--data", "d", "--out", str(tmp_path), "--peft", "oft"]
    monkeypatch.setattr(sys, "argv", ["edge_client", "train", *given, "--peft-option", "block=8"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == UsageError.exit_code
    assert "--peft-option block is none of --peft oft: it takes block_share, coft," in capsys.readouterr().err


def test_rows_leave_room_for_the_prompt_in_what_the_server_takes(
    configured: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = EdgeModel.longest

    def of_a_server_with_a_limit(self: EdgeModel, *asked: int) -> int:
        self.row_tokens = 20
        return longest(self, *asked)

    monkeypatch.setattr(EdgeModel, "longest", of_a_server_with_a_limit)
    said = carry_out(configured(by_name("prompt"), "llama", steps=1, max_length=64), tmp_path / "run")
    assert "rows were longer than 15 tokens and were cut" in said


def changed_settings(**changes: object) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def other_tensor(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    values = load_file(path)
    save_file({name.replace("layers.5", "layers.4"): value for name, value in values.items()}, path)


def cut_tensor(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: value[:1].clone() for name, value in load_file(path).items()}, path)


def no_settings(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


SPOILT: dict[str, Callable[[Path], None]] = {
    "another scale": changed_settings(lora_alpha=1),
    "another method": changed_settings(peft_type="IA3"),
    "other modules": changed_settings(target_modules=["q_proj"]),
    "more of it trained": changed_settings(modules_to_save=["lm_head"]),
    "code to import": changed_settings(megatron_core="somewhere.else"),
    "a field that is unknown": changed_settings(something="else"),
    "no settings": no_settings,
    "tensors of another block": other_tensor,
    "tensors of another size": cut_tensor,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_an_adapter_that_says_something_else_than_the_run_is_refused(
    spoil: Callable[[Path], None], made: Run, configured: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    case = by_name("pissa")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (made(case, "llama") / "adapter").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    config = configured(case, "llama", "local")
    edge = load_local(config)
    tuning = attach(edge.model, edge.found, edge.cut, config.placement)
    load_adapter(tuning, adapter, None)
    spoil(adapter)
    with pytest.raises(BundleError):
        load_adapter(tuning, adapter, None)
