"""A model without an output layer is merged into with a classifier's head alone, and plugged into by nobody."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from emulator.tuned_ends import check
from isthmus import bundle
from isthmus.errors import BundleError
from isthmus.load import model_digest
from tests.emulator.adapters import KEY, outline
from tests.emulator.adapters import saved as saved_without_head
from tests.emulator.test_plug_in_command import command as plug_in_command
from tests.merge.adapters import disturb, made, named
from tests.merge.test_classifiers import TARGETS, classifier, saved
from tests.merge.test_command import command
from tests.merge.test_refused import refused

FAMILIES = ("bert", "vit", "llama")
OWN = [(family, kind) for family in FAMILIES for kind in ("bitfit", "full", "head")]
OWN.remove(("llama", "bitfit"))  # which has no biases


@pytest.fixture
def headless(bases: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Encoders of text and of pictures, and a language model that was saved as a classifier."""
    classifier(bases["llama"]).save_pretrained(tmp_path / "saved")
    return {**bases, "llama": tmp_path / "saved"}


def unnamed(model: Path, place: Path, family: str, task: str | None) -> Path:
    """Plain LoRA on the bare model, as peft saves it."""
    bare = AutoModel.from_pretrained(model)
    adapted = peft.get_peft_model(bare, peft.LoraConfig(r=4, target_modules=TARGETS[family]))
    disturb(adapted)
    adapted.peft_config["default"].task_type = task
    adapted.save_pretrained(place)
    return place


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("task", "why"),
    [
        (None, "the adapter holds no head, and this"),
        ("CAUSAL_LM", "the adapter holds no head, and this"),
        ("SEQ_CLS", "the adapter holds no head, and says that it is a classifier's"),
        ("FEATURE_EXTRACTION", "task_type is 'FEATURE_EXTRACTION'"),
    ],
)
def test_lora_without_a_head_is_refused_in_one_line(
    family: str, task: str | None, why: str, headless: dict[str, Path], tmp_path: Path
) -> None:
    adapter = unnamed(headless[family], tmp_path / "adapter", family, task)
    refused(headless[family], adapter, tmp_path / "out", why)


@pytest.mark.parametrize(("family", "kind"), OWN)
def test_weights_of_the_ends_own_without_a_head_are_refused_in_one_line(
    family: str, kind: str, headless: dict[str, Path], tmp_path: Path
) -> None:
    adapter = saved(headless[family], tmp_path / "adapter", kind)
    values = load_file(adapter / "adapter.safetensors")
    inside = {name: value for name, value in values.items() if "layer" in name}
    save_file(inside or {"elsewhere.weight": torch.zeros(3, 32)}, adapter / "adapter.safetensors")
    for file in ("manifest.json", "manifest.sig"):
        (adapter / file).unlink()
    bundle.write(adapter, "adapter", model_digest(headless[family]), "1:1", {"method": kind}, KEY)
    given = ["--model", headless[family], "--adapter", adapter, "--out", tmp_path / "out"]
    for merging, why in ((command, "the adapter holds no head"), (plug_in_command, "this model has no output layer")):
        _, error = merging(*given)
        assert isinstance(error, BundleError), error
        assert why in str(error)
        assert "\n" not in str(error)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_that_says_it_is_a_language_models_is_not_plugged_into_what_is_none(
    family: str, headless: dict[str, Path], tmp_path: Path
) -> None:
    adapter = unnamed(headless[family], tmp_path / "adapter", family, "CAUSAL_LM")
    with pytest.raises(BundleError, match=r"this model has no output layer.*`cloud_node merge`") as caught:
        check(adapter, outline(headless[family]))
    assert "\n" not in str(caught.value)


def test_one_merge_builds_the_model_without_weights_once(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [
        made(tiny_models["llama"], tmp_path / "peft", named("dora"), "llama"),
        saved_without_head(tiny_models["llama"], tmp_path / "full", "1:1", "full"),
        saved_without_head(tiny_models["llama"], tmp_path / "head", "1:1", "head"),
    ]
    built: list[str] = []
    begin = PreTrainedModel.__init__

    def watched(self: PreTrainedModel, *args: object, **kwargs: object) -> None:
        built.append(type(self).__name__)
        begin(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(PreTrainedModel, "__init__", watched)
    for adapter in adapters:
        built.clear()
        _, error = command(
            "--model", tiny_models["llama"], "--adapter", adapter, "--out", tmp_path / f"of-{adapter.name}"
        )
        assert error is None, error
        assert built.count("LlamaForCausalLM") == 2, "once without weights, and once with them"
