"""Plugging in is exact by block name: ends tuned on an emulator are the whole model's, for every family and cut."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from edge_client.adapter_folder import load_adapter, save_adapter
from edge_client.attaching import Placement, attach
from edge_client.tuning import Tuning
from isthmus.blocks import BlockList
from isthmus.cut import Cut
from isthmus.emulated.load import shape_span
from isthmus.emulated.shrink import make_recipe
from isthmus.load import load_whole, model_digest
from tests.parity.reference import ALPHA, RANK, random_values, whole_model
from tests.parity.test_families import BLOCKS, FAMILIES, batches, configuration, save

EXACT = 1e-5
"""Absolute difference of logits, of size about 5: none as a rule, but products may round by where values lie."""

MATTERS = 1e-2
"""Less of a difference between models would prove nothing."""

EMULATORS = {"1:1": ("drop", 1, None), "2:0": ("quant", None, 4), "0:2": ("drop", 1, None), "0:0": ("quant", None, 4)}
"""Method, blocks kept and bits by cut; forms stay empty, so that nothing but the ends can be right."""


@dataclass(frozen=True)
class Untouched:
    """A saved random model, and its logits without any adapter."""

    directory: Path
    logits: torch.Tensor


Models = Callable[[str], Untouched]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """One per family, made when first asked for."""
    made: dict[str, Untouched] = {}

    def find(family: str) -> Untouched:
        if family not in made:
            directory = save(tmp_path_factory.mktemp(family), configuration(family))
            made[family] = Untouched(directory, logits(whole_model(directory)))
        return made[family]

    return find


def placed(kind: str, cut: str) -> Placement:
    targets = ["lm_head"] if cut == "0:0" else ["all-linear"]
    return Placement(kind, RANK, ALPHA, targets if kind == "lora" else None, seed=0)  # type: ignore[arg-type]


def emulated(directory: Path, cut: str, kind: str) -> tuple[Tuning, BlockList]:
    """The ends of a model around an emulator that knows nothing, tuned to values that matter."""
    model, found = load_whole(directory, torch.float32)
    method, keep, bits = EMULATORS[cut]
    shape_span(found, make_recipe(method, Cut.parse(cut), BLOCKS, keep, bits, {}))  # type: ignore[arg-type]
    tuning = attach(model, found, Cut.parse(cut), placed(kind, cut))
    drawn = random_values(tuning.trainable)
    tuning.load(
        {name: value + drawn[name] if kind == "full" else drawn[name] for name, value in tuning.values().items()}
    )
    return tuning, found


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    ids_BT, mask_BT = batches()["right"]
    found: torch.Tensor = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[mask_BT.bool()]
    return found


def differ(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


def plugged_in(directory: Path, cut: str, kind: str, place: Path) -> dict[str, torch.Tensor]:
    """Logits of the tuned ends: on the emulator, saved and loaded into the whole model, and around the true span."""
    tuning, found = emulated(directory, cut, kind)
    save_adapter(tuning, place, "model", model_digest(directory), Cut.parse(cut), Ed25519PrivateKey.generate())
    whole, true = load_whole(directory, torch.float32)
    loaded = attach(whole, true, Cut.parse(cut), placed(kind, cut))
    load_adapter(loaded, place, None)
    seen = {"emulator": logits(tuning.model), "loaded": logits(loaded.model)}
    for number in Cut.parse(cut).span(BLOCKS):
        found.blocks[number] = true.blocks[number]
    return seen | {"true span": logits(tuning.model)}


@pytest.mark.parametrize("cut", EMULATORS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_lora_of_an_emulators_ends_is_the_whole_models_here_around_the_true_span_and_in_plain_peft(
    family: str, cut: str, models: Models, tmp_path: Path
) -> None:
    model = models(family)
    seen = plugged_in(model.directory, cut, "lora", tmp_path / "adapter")
    plain = logits(PeftModel.from_pretrained(whole_model(model.directory), tmp_path / "adapter").eval())
    assert differ(seen["loaded"], plain) < EXACT
    assert differ(seen["true span"], plain) < EXACT
    assert differ(model.logits, plain) > MATTERS
    assert differ(seen["emulator"], plain) > MATTERS


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_of_an_emulators_ends_are_the_whole_models_here_around_the_true_span_and_by_name(
    family: str, models: Models, tmp_path: Path
) -> None:
    model = models(family)
    seen = plugged_in(model.directory, "1:1", "full", tmp_path / "adapter")
    named = whole_model(model.directory)
    assert not named.load_state_dict(
        load_file(tmp_path / "adapter" / "adapter.safetensors"), strict=False
    ).unexpected_keys
    plain = logits(named)
    assert differ(seen["loaded"], plain) < EXACT
    assert differ(seen["true span"], plain) < EXACT
    assert differ(model.logits, plain) > MATTERS
    assert differ(seen["emulator"], plain) > MATTERS
