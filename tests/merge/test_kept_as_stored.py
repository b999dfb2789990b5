"""What a model is stored in, and what peft stores besides an adapter, make no difference."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import BundleError
from tests.emulator.adapters import EXACT, apart, saved, weights, whole
from tests.emulator.conftest import logits
from tests.merge.adapters import PLAIN, beside, disturb, made, merged, named
from tests.merge.test_methods import check

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def half(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that is stored in bfloat16."""
    place = tmp_path_factory.mktemp("half") / "model"
    whole(tiny_models["llama"]).to(torch.bfloat16).save_pretrained(place)
    return place


@pytest.mark.parametrize("name", PLAIN)
def test_weights_of_a_model_in_half_precision_are_merged_exactly_and_rounded_once(
    name: str, half: Path, tmp_path: Path
) -> None:
    adapter = made(half, tmp_path / "adapter", named(name), "llama")
    _, changed = merged(half, adapter, tmp_path / "out")
    whole(half).float().save_pretrained(tmp_path / "single")
    merged(tmp_path / "single", adapter, tmp_path / "exact")
    exact, stored = weights(whole(tmp_path / "exact")), weights(whole(tmp_path / "out"))
    assert changed.dtype == "bfloat16"
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(value, exact[name].to(torch.bfloat16)) for name, value in stored.items())


def test_a_base_layer_that_peft_stored_besides_is_let_be_if_it_is_the_models_own(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = made(tiny_models["gpt2"], tmp_path / "adapter", named("head adapted"), "gpt2")
    values = load_file(adapter / WEIGHTS)
    stored = "base_model.model.lm_head.base_layer.weight"
    assert stored in values
    values[stored] += 0.1
    save_file(values, adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BundleError, match="holds another lm_head than the model"):
        merged(tiny_models["gpt2"], adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks_that_adalora_took_away_may_be_missing_from_its_file(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=2, lora_alpha=8, total_step=4, target_modules=["q_proj"]
    )
    adapted = peft.get_peft_model(whole(tiny_models["llama"]), config)
    disturb(adapted)
    for step in range(1, 5):
        loss = adapted(input_ids=torch.arange(3, 43)[None], labels=torch.arange(3, 43)[None]).loss
        loss.backward()
        adapted.base_model.update_and_allocate(step)
    adapted.save_pretrained(tmp_path / "adapter")
    kept = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert {len(mask) for mask in kept.values()} == {6}
    assert sum(map(sum, kept.values())) < 36
    shapes = {tuple(value.shape) for value in load_file(tmp_path / "adapter" / WEIGHTS).values()}
    assert any(1 < shape[0] < 6 for shape in shapes), "an adapter with every rank proves nothing"
    assert not check(tiny_models["llama"], tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("kind", ["dora", "adalora", "ia3", "vera"])
def test_what_an_edge_saves_of_other_methods_is_merged(kind: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved(tiny_models["gpt2"], tmp_path / "adapter", "1:1", kind)
    assert not check(tiny_models["gpt2"], adapter, tmp_path / "out")


def test_an_adapted_head_or_embedding_is_untied_and_rows_of_both_stay_tied(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    for name, untied in (("head adapted", True), ("embedding whole", True), ("rows", False), ("lora", False)):
        adapter = made(tiny_models["gpt2"], tmp_path / f"{name}-adapter", named(name), "gpt2")
        _, changed = merged(tiny_models["gpt2"], adapter, tmp_path / name)
        model = whole(tmp_path / name)
        assert changed.untied == untied
        assert model.config.tie_word_embeddings == (not untied)
        assert (model.lm_head.weight is model.transformer.wte.weight) == (not untied)
        assert apart(logits(model), logits(beside(tiny_models["gpt2"], adapter))) < EXACT
