"""Tuned ends enter the whole model by block name and change nothing else."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from isthmus.cut import Cut
from isthmus.errors import UsageError
from tests.emulator.adapters import EXACT, apart, plugged, saved, weights, whole
from tests.emulator.conftest import BLOCKS, logits
from tests.emulator.test_plug_in_refused import filled

FAMILIES = ("llama", "gpt2", "opt")
CUTS = ("1:1", "2:0", "0:2")
BLOCK_LIST = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}
USUAL = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_proj"], "opt": ["q_proj", "fc1"]}


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny model per family; GPT-2's and OPT's output layers share the embedding's matrix."""
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    place = tmp_path_factory.mktemp("opt") / "tiny-opt"
    config = AutoConfig.for_model("opt", **sizes, vocab_size=259, max_position_embeddings=64, word_embed_proj_dim=32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(place)
    return {**tiny_models, "opt": place}


@pytest.mark.parametrize("head", [False, True], ids=["blocks", "blocks and head"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_gives_the_logits_of_plain_peft_and_touches_no_other_weight(
    models: dict[str, Path], family: str, cut: str, head: bool, tmp_path: Path
) -> None:
    targets = [*USUAL[family], *(["lm_head"] if head else [])]
    adapter = saved(models[family], tmp_path / "adapter", cut, targets=targets)
    tuned, changed, ours = plugged(models[family], adapter, tmp_path / "out")
    untouched = whole(models[family])
    theirs = peft.PeftModel.from_pretrained(whole(models[family]), str(adapter)).eval()
    assert apart(logits(theirs), logits(untouched)) > 1000 * EXACT, "an adapter that does nothing proves nothing"
    assert apart(logits(ours), logits(theirs)) < EXACT
    old, new = weights(untouched), weights(ours)
    differing = {name for name, value in new.items() if not torch.equal(value, old[name])}
    assert differing == {f"{module}.weight" for module in tuned.modules}
    blocks = {int(name.split(".")[len(BLOCK_LIST[family].split("."))]) for name in differing if "lm_head" not in name}
    assert blocks == set(Cut.parse(cut).ends(BLOCKS))
    assert changed.weights == len(differing)
    assert changed.parameters == sum(int((new[name] != old[name]).sum()) for name in differing)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_head_is_untied_from_the_embedding_and_any_other_stays_tied(
    models: dict[str, Path], family: str, tmp_path: Path
) -> None:
    tied = family != "llama"
    for name, targets in (("head", ["lm_head"]), ("blocks", USUAL[family])):
        adapter = saved(models[family], tmp_path / f"{name}-adapter", "1:1", targets=targets)
        _, changed, model = plugged(models[family], adapter, tmp_path / name)
        assert changed.untied == (tied and name == "head")
        assert model.config.tie_word_embeddings == (tied and name == "blocks")
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == (tied and name == "blocks")


REPLACED = [(family, kind) for family in FAMILIES for kind in ("bitfit", "full")]
REPLACED.remove(("llama", "bitfit"))  # which has no biases


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("family", "kind"), REPLACED)
def test_replaced_weights_are_the_edges_own_and_all_others_the_models(
    models: dict[str, Path], family: str, kind: str, cut: str, tmp_path: Path
) -> None:
    adapter = saved(models[family], tmp_path / "adapter", cut, kind)
    values = load_file(adapter / "adapter.safetensors")
    tuned, changed, model = plugged(models[family], adapter, tmp_path / "out")
    old, new = weights(whole(models[family])), weights(model)
    assert all(torch.equal(new[name], values.get(name, old[name])) for name in new)
    assert {int(name.removeprefix(BLOCK_LIST[family]).split(".")[1]) for name in values} == set(
        Cut.parse(cut).ends(BLOCKS)
    )
    assert (tuned.kind, str(tuned.cut), changed.weights) == (kind, cut, len(values))
    assert changed.parameters == sum(int((value != old[name]).sum()) for name, value in values.items()) > 0


def test_the_plugged_in_model_keeps_the_checkpoints_dtype_and_has_its_tokenizer_and_settings(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "half"
    whole(models["llama"]).to(torch.bfloat16).save_pretrained(model)
    AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(model)
    _, changed, ours = plugged(model, saved(model, tmp_path / "adapter", "1:1"), tmp_path / "out")
    assert changed.dtype == "bfloat16"
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert ours.config.model_type == "llama"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_in_half_precision_those_values_are_counted_that_are_saved_as_others(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model, targets = tmp_path / "half", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    whole(models["llama"]).to(torch.bfloat16).save_pretrained(model)
    adapter = filled(saved(model, tmp_path / "adapter", "2:2", targets=targets), lambda value: value / 10)
    tuned, changed, ours = plugged(model, adapter, tmp_path / "out")
    old, new = weights(whole(model)), weights(ours)
    inside = {f"{module}.weight" for module in tuned.modules}
    differing = sum(int((new[name] != old[name]).sum()) for name in inside)
    assert 0 < differing < sum(old[name].numel() for name in inside), "changes that none is too small for prove nothing"
    assert changed.parameters == differing


def test_a_folder_that_holds_something_is_never_written_to(models: dict[str, Path], tmp_path: Path) -> None:
    adapter, out = saved(models["llama"], tmp_path / "adapter", "1:1"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something"):
        plugged(models["llama"], adapter, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_save_that_fails_leaves_nothing(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(models["llama"], tmp_path / "adapter", "1:1")

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(UsageError, match="No space left"):
        plugged(models["llama"], adapter, tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())
