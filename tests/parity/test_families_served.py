"""Every family over a real server: the whole model's logits however rows are padded, and its very tokens generated."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import CUTS
from tests.harness import Server, byte_tokenizer, serving
from tests.parity.reference import connected, relative, whole_model
from tests.parity.test_families import EXACT, FAMILIES, batches, configuration, save
from tests.parity.test_generation import NEW_TOKENS, generated, prompts

ELSEWHERE = {"llama", "gpt2"}
"""Families with suites of their own."""


@pytest.fixture(scope="module", params=sorted(FAMILIES.keys() - ELSEWHERE))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Iterator[tuple[Path, Server]]:
    """A tiny model of a family, and a server that offers every cut of it."""
    directory = save(tmp_path_factory.mktemp(request.param) / "model", configuration(request.param))
    byte_tokenizer().save_pretrained(directory)
    with serving(directory, *(flag for cut in CUTS for flag in ("--cut", cut)), cache=cache) as server:
        yield directory, server


@pytest.mark.parametrize("cut", CUTS)
def test_logits_and_tokens_are_those_of_the_whole_model(served: tuple[Path, Server], cut: str) -> None:
    directory, server = served
    whole = whole_model(directory)
    with connected(server, cut) as edge:
        for padding, (ids_BT, mask_BT) in batches().items():
            mask = None if padding == "none" else mask_BT
            with torch.no_grad():
                ours, theirs = (
                    model(ids_BT, attention_mask=mask, use_cache=False).logits[mask_BT.bool()]
                    for model in (edge.model, whole)
                )
            assert relative({"": ours}, {"": theirs}) < EXACT, padding
        for inputs in (prompts(7), prompts(5, 11, 8)):
            assert torch.equal(generated(edge.model, inputs), generated(whole, inputs))
        drawn = generated(whole, prompts(5, 11, 8), do_sample=True)
        assert torch.equal(generated(edge.model, prompts(5, 11, 8), do_sample=True), drawn)
        assert len(set(drawn[:, -NEW_TOKENS:].flatten().tolist())) > 2, "a constant answer compares nothing"
