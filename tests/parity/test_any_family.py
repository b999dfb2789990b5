"""A family that nobody listed is served where it computes the same cut as whole, and is refused by name where not."""

import logging
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cloud_node.families import TRIED, check_family
from cloud_node.span import Span
from isthmus.architectures import reads_both_ways
from isthmus.blocks import narrowed
from isthmus.classifier import Head
from isthmus.cut import Cut
from isthmus.errors import CutError
from isthmus.load import load_ends, load_span, load_whole
from isthmus.rows import Rows
from tests.classify.conftest import ENCODERS
from tests.conftest import CUTS
from tests.parity.any_family import tiny_configuration
from tests.parity.reference import relative, whole_model
from tests.parity.test_families import EXACT, FAMILIES, batches, save, split

SEED, PICKED = 20261123, 3


def tiny(family: str) -> PreTrainedConfig:
    config = tiny_configuration(family)
    assert config is not None
    return config


def test_the_families_that_are_served_untried_are_those_that_the_tests_cut() -> None:
    assert {*FAMILIES, *ENCODERS, "vit"} == TRIED


def fits(family: str) -> bool:
    config = tiny_configuration(family)
    if config is None or reads_both_ways(config):
        return False
    try:
        check_family(config, torch.float32)
    except CutError:
        return False
    return True


def test_families_picked_at_random_that_fit_by_structure_are_exact_at_every_cut(tmp_path: Path) -> None:
    others = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - TRIED)
    random.Random(SEED).shuffle(others)
    picked: list[str] = []
    while len(picked) < PICKED:
        family = others.pop()
        if not fits(family):
            continue
        picked.append(family)
        whole = whole_model(directory := save(tmp_path / family, tiny(family)))
        for cut in CUTS:
            model = split(directory, Cut.parse(cut))
            for padding, (ids_BT, mask_BT) in batches().items():
                with torch.no_grad():
                    ours, theirs = (
                        one(ids_BT, attention_mask=mask_BT, use_cache=False).logits[mask_BT.bool()]
                        for one in (model, whole)
                    )
                assert relative({"": ours}, {"": theirs}) < EXACT, (family, cut, padding)


@pytest.mark.parametrize(
    ("family", "special"),
    [("olmo", "norms without weights"), ("codegen", "blocks that return tuples"), ("qwen3_moe", "experts")],
)
def test_a_family_that_is_not_listed_is_tried_out_and_said_to_fit(
    family: str, special: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        check_family(tiny(family), torch.float32)
    assert f"{family} is not among the families" in caplog.text, special


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("ctrl", "computes something else cut than whole"),
        ("mamba", "cannot be cut"),
        ("recurrent_gemma", "cannot be cut"),
        ("bart", "0 lists of 4 identical blocks"),
    ],
)
def test_a_family_that_does_not_fit_is_refused_by_name_with_those_that_do(family: str, why: str) -> None:
    with pytest.raises(CutError, match=f"{family} cannot be cut.*") as refused:
        check_family(tiny(family), torch.float32)
    assert why in str(refused.value)
    assert "llama" in str(refused.value)


@pytest.mark.parametrize("family", ["electra", "modernbert", "deit"])
def test_an_encoder_that_is_not_listed_is_tried_out_too_and_served(
    family: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    more = {"electra": {"embedding_size": 32}, "deit": {"image_size": 16, "patch_size": 4}}
    config = AutoConfig.for_model(family, **sizes, **more.get(family, {}))
    with caplog.at_level(logging.INFO):
        check_family(config, torch.float32)
    assert f"{family} is not among the families" in caplog.text
    AutoModel.from_config(config).save_pretrained(tmp_path)
    load_ends(tmp_path, Cut(1, 1), torch.float32, Head(3))
    served, hidden_ND = Span(*load_span(tmp_path, Cut(1, 1), torch.float32), Cut(1, 1)), torch.randn(5, 32)
    whole, found = load_whole(tmp_path, torch.float32)
    in_place = Span(*narrowed(whole, found, Cut(1, 1).span(4)), Cut(1, 1))
    theirs = in_place.forward(hidden_ND, Rows((5,), (0,)))
    assert relative({"": served.forward(hidden_ND, Rows((5,), (0,)))}, {"": theirs}) < EXACT


@pytest.mark.parametrize(("family", "changes"), [("ernie", {}), ("mpnet", {}), ("bert", {"is_decoder": True})])
def test_an_encoder_whose_blocks_need_what_is_beside_them_is_refused_and_so_is_a_decoder_made_of_one(
    family: str, changes: dict[str, bool]
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    with pytest.raises(CutError, match=f"{family} cannot be cut"):
        check_family(AutoConfig.for_model(family, **sizes, **changes), torch.float32)


def test_a_listed_family_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        check_family(tiny("llama"), torch.float32)
    assert not caplog.text
