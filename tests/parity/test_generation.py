"""What a split model generates over a real server is, token by token, what the whole model generates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria

from edge_client.edge_model import EdgeModel
from tests.conftest import CUTS, FAMILIES
from tests.harness import Server
from tests.parity.reference import connected, padded, ragged_sequences, whole_model

NEW_TOKENS = 12


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences(lengths, seed=3)], left=True)
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def generated(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    torch.manual_seed(0)
    settings = {"do_sample": False, **settings}
    tokens: torch.Tensor = model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0, **settings
    )
    return tokens


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_token_identical_alone_and_in_a_left_padded_batch(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str, cut: str
) -> None:
    whole = whole_model(tiny_models[family])
    with connected(servers[family], cut) as edge:
        for inputs in (prompts(7), prompts(1), prompts(5, 11, 8), prompts(6, 6)):
            theirs = generated(whole, inputs)
            assert torch.equal(generated(edge.model, inputs), theirs)
            assert len(set(theirs[:, -NEW_TOKENS:].flatten().tolist())) > 2, "a constant answer compares nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_several_answers_are_those_of_the_whole_model(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str, settings: dict[str, Any]
) -> None:
    inputs, whole = prompts(5, 9), whole_model(tiny_models[family])
    with connected(servers[family], "1:1") as edge:
        assert torch.equal(generated(edge.model, inputs, **settings), generated(whole, inputs, **settings))


class Dropping(StoppingCriteria):
    """Never stops; at some lengths it has the cloud forget the sequence that the cache stands for."""

    def __init__(self, edge: EdgeModel, cache: DynamicCache, at: set[int]) -> None:
        self._edge, self._cache, self._at = edge, cache, at
        self.seen: list[str] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        name = self._cache.isthmus_sequence.name
        self.seen.append(name)
        if len(self.seen) in self._at:
            assert self._edge.link is not None
            self._edge.link.release([], [name])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("cut", ["1:1", "2:0", "0:0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_the_cloud_dropped_in_mid_generation_changes_nothing(
    servers: dict[str, Server], tiny_models: dict[str, Path], family: str, cut: str
) -> None:
    whole = whole_model(tiny_models[family])
    with connected(servers[family], cut) as edge:
        for inputs in (prompts(7), prompts(5, 11, 8)):
            cache = DynamicCache(config=edge.model.config)
            dropping = Dropping(edge, cache, at={3, 4, 8})
            ours = generated(edge.model, inputs, past_key_values=cache, stopping_criteria=[dropping])
            assert torch.equal(ours, generated(whole, inputs))
            began = [number for number in range(1, NEW_TOKENS) if dropping.seen[number] != dropping.seen[number - 1]]
            assert began == [3, 4, 8], "a sequence begins anew after each drop and at no other step"


def test_rows_that_stay_in_place_are_sent_once_and_rows_that_moved_begin_a_sequence(
    servers: dict[str, Server], tiny_models: dict[str, Path]
) -> None:
    with connected(servers["llama"], "1:1") as edge:
        ids_BT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
        cache = DynamicCache(config=edge.model.config)
        with torch.no_grad():
            edge.model(ids_BT, past_key_values=cache)
            first = cache.isthmus_sequence.name
            edge.model(torch.tensor([[13], [14]]), past_key_values=cache)
            assert cache.isthmus_sequence.name == first
            cache.reorder_cache(torch.tensor([1, 0]))
            ours = edge.model(torch.tensor([[15], [16]]), past_key_values=cache).logits
            assert cache.isthmus_sequence.name != first
            whole = whole_model(tiny_models["llama"])
            theirs = whole(torch.tensor([[9, 10, 11, 12, 14, 15], [5, 6, 7, 8, 13, 16]])).logits[:, -1:]
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_continued_generation_takes_several_tokens_at_once(
    servers: dict[str, Server], tiny_models: dict[str, Path]
) -> None:
    ids_BT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]])
    with connected(servers["gpt2"], "1:1") as edge, torch.no_grad():
        cache = DynamicCache(config=edge.model.config)
        parts = [edge.model(part, past_key_values=cache).logits for part in ids_BT.split([4, 3, 2], dim=1)]
        theirs = whole_model(tiny_models["gpt2"])(ids_BT).logits
    assert torch.allclose(torch.cat(parts, 1), theirs, atol=1e-5)
