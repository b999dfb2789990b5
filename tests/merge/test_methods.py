"""A merged model is the one that plain peft makes of the same adapter, and no other weight of it is touched."""

from pathlib import Path

import pytest
import torch

from tests.emulator.adapters import EXACT, apart, saved, weights, whole
from tests.emulator.conftest import logits
from tests.merge.adapters import CONVERTED, EACH, beside, made, merged, named

FILES = {".safetensors", ".json", ".jinja"}


def check(model: Path, adapter: Path, out: Path) -> set[str]:
    """Merge, compare with plain peft, and give the names of the weights that differ."""
    examined, changed = merged(model, adapter, out)
    untouched, ours, theirs = whole(model), whole(out), beside(model, adapter)
    assert apart(logits(theirs), logits(untouched)) > 1000 * EXACT, "an adapter that does nothing proves nothing"
    assert apart(logits(ours), logits(theirs)) < EXACT
    old, new = weights(untouched), weights(ours)
    differing = {name for name, value in new.items() if not torch.equal(value, old[name])}
    inside = tuple(f"{name}." for name in (*examined.modules.targets, *examined.modules.saved))
    for module in inside:
        assert any(name.startswith(module) for name in differing) or module == "transformer.wte.", module
    own = dict(ours.named_parameters())
    assert sum(changed.tensors.values()) == len(differing & own.keys())
    assert changed.parameters == sum(int((own[name] != old[name]).sum()) for name in differing & own.keys())
    assert {path.suffix for path in out.iterdir()} <= FILES
    return {name for name in differing if not name.startswith(inside)}


@pytest.mark.parametrize(("name", "family"), EACH)
def test_a_merged_model_is_plain_pefts_and_no_other_weight_changes(
    name: str, family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = made(tiny_models[family], tmp_path / "adapter", named(name), family)
    others = check(tiny_models[family], adapter, tmp_path / "out")
    if name.startswith("rows"):
        assert others <= {"model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight"}
    elif name == "biases":
        assert all(other.endswith(".bias") for other in others)
    else:
        assert not others


@pytest.mark.parametrize("name", CONVERTED)
def test_what_an_edge_kept_of_lora_that_began_in_the_weights_is_merged(
    name: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = saved(tiny_models["llama"], tmp_path / "adapter", "1:1", name)
    assert not check(tiny_models["llama"], adapter, tmp_path / "out")
