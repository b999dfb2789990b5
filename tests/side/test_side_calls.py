"""A side network keeps nothing of a call, copies and counts like any module, and refuses what it cannot do."""

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from edge_client.side import Joined, SideShape, attach_side
from isthmus.errors import CutError, UsageError
from isthmus.ledger.flops import ModelFlops, count, on_meta
from isthmus.load import load_ends, load_whole
from isthmus.training.outputs import select_outputs, wanting
from tests.conftest import FAMILIES
from tests.harness import save_tiny_model
from tests.parity.reference import HIDDEN, whole_model
from tests.side.network import CUT, NUMBERS, SHAPE, SIZE, VOCABULARY, WIDTH, attached, moved, token_ids


def test_calls_of_concurrent_threads_do_not_mix_their_taps(tiny_models: dict[str, Path]) -> None:
    side, inputs = moved(attached(tiny_models["llama"])), [token_ids(seed=seed) for seed in (1, 2)]
    alone = [side.logits(ids_BT) for ids_BT in inputs]
    both_inside = threading.Barrier(2, timeout=30)
    joined = side.found.blocks[-1]
    assert isinstance(joined, Joined)

    def wait(*_: object) -> None:
        both_inside.wait()

    joined.side.blocks.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(side.logits, inputs))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_runs_on_its_own_weights(tiny_models: dict[str, Path], family: str) -> None:
    side = moved(attached(tiny_models[family]))
    before, copy = side.logits(token_ids()), deepcopy(side.model)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if ".side." in name:
                parameter.zero_()
    plain = whole_model(tiny_models[family])(input_ids=token_ids(), use_cache=False).logits
    assert torch.equal(copy(input_ids=token_ids(), use_cache=False).logits, plain)
    assert torch.equal(side.logits(token_ids()), before)


def flops_of(model: nn.Module) -> ModelFlops:
    twin = on_meta(model)

    def run(tokens: int, outputs: int) -> torch.Tensor:
        embeds_BTD = torch.empty(1, tokens, HIDDEN, device="meta")
        with wanting((torch.arange(tokens) < outputs)[None]):
            logits: torch.Tensor = twin(inputs_embeds=embeds_BTD, past_key_values=DynamicCache(), use_cache=True).logits
        return logits

    return count(run)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_meta_copys_flops_grow_by_the_closed_formula(tiny_models: dict[str, Path], family: str) -> None:
    model, found = load_whole(tiny_models[family], torch.float32)
    select_outputs(model)
    bare = flops_of(model).forward.of(3, 13, outputs=5)
    attach_side(model, found, CUT, SHAPE, seed=0, here=True)
    flops, taps = flops_of(model), len(NUMBERS)
    downs, blocks, up = taps * 2 * WIDTH * SIZE, taps * 2 * 16 * SIZE**2, 2 * SIZE * HIDDEN
    projected, attention = taps * 2 * HIDDEN * WIDTH, taps * 4 * 13**2 * SIZE
    grown = 3 * (13 * (projected + downs + blocks + up) + attention)
    assert flops.forward.of(3, 13, outputs=5) == bare + grown
    # Nothing goes back through a projection; the head passes its gradient on and has none of its own.
    trained = 3 * (13 * 2 * (downs + blocks + up) + 2 * attention)
    assert flops.backward.of(3, 13, outputs=5) == trained + 5 * 2 * HIDDEN * VOCABULARY


def test_a_seed_gives_one_network_whatever_is_drawn_around_it(tiny_models: dict[str, Path]) -> None:
    torch.manual_seed(5)
    first, drawn = attached(tiny_models["llama"], seed=3).trained, torch.rand(4)
    torch.rand(7)
    second, other = attached(tiny_models["gpt2"], seed=3).trained, attached(tiny_models["llama"], seed=4).trained
    assert first.keys() == second.keys() == other.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(4))


@pytest.mark.parametrize(("reduction", "every", "width"), [(4, 2, 24), (8, 1, 32), (16, 3, 5)])
def test_the_parameters_are_as_many_as_the_closed_formula_says(
    tiny_models: dict[str, Path], reduction: int, every: int, width: int
) -> None:
    trained = attached(tiny_models["gpt2"], SideShape(reduction, every, width)).trained
    size, taps = HIDDEN // reduction, {1: 5, 2: 2, 3: 1}[every]
    entries, blocks = taps * (width + width * size), taps * (4 * size**2 + 3 * 4 * size**2 + 2 * size)
    assert sum(map(torch.Tensor.numel, trained.values())) == entries + blocks + (taps - 1) + size + size * HIDDEN
    assert all(name.startswith("side.") for name in trained)


@pytest.mark.parametrize(("hidden_size", "heads"), [(576, 4), (256, 2), (192, 1), (320, 2)])
def test_heads_share_the_width_evenly_and_have_at_least_16_values(tmp_path: Path, hidden_size: int, heads: int) -> None:
    save_tiny_model(tmp_path, "gpt2", n_embd=hidden_size)
    side = attached(tmp_path, SideShape(8, 5, 8))
    joined = side.found.blocks[-1]
    assert isinstance(joined, Joined)
    assert joined.side.blocks.config.num_attention_heads == heads
    assert side.logits(token_ids()).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (SideShape(5, 2, 8), "reduction 5"),
        (SideShape(32, 2, 8), "reduction 32"),  # one value a token cannot be rotated
        (SideShape(4, 2, HIDDEN + 1), "tap width"),
        (SideShape(4, 2, 0), "tap width"),
        (SideShape(4, 6, 8), "no tap"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(tiny_models: dict[str, Path], shape: SideShape, named: str) -> None:
    with pytest.raises(UsageError, match=named) as refusal:
        attached(tiny_models["llama"], shape)
    assert "\n" not in str(refusal.value)


def test_a_call_that_keeps_a_cache_is_refused_and_the_next_one_is_well(tiny_models: dict[str, Path]) -> None:
    side = moved(attached(tiny_models["llama"]))
    before = side.logits(token_ids())
    with pytest.raises(CutError, match="use_cache=False"):
        side.model(input_ids=token_ids(), use_cache=True)
    assert torch.equal(side.logits(token_ids()), before)


def test_greedy_generation_without_a_cache_takes_the_best_token_of_each_whole_row(tiny_models: dict[str, Path]) -> None:
    side, ids_BT = moved(attached(tiny_models["llama"])), token_ids(rows=1)
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": False, "eos_token_id": None}
    generated = side.model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **settings)
    for width, _ in pairwise(range(ids_BT.shape[1], generated.shape[1] + 1)):
        assert generated[0, width] == side.logits(generated[:, :width])[0, -1].argmax()


def test_a_call_without_taps_says_what_to_do(tiny_models: dict[str, Path]) -> None:
    side = attached(tiny_models["gpt2"])
    with pytest.raises(UsageError, match="no tap came from block 1; call the model whole"):
        side.found.blocks[-1](torch.zeros(1, 3, HIDDEN))
    ends, gaps = load_ends(tiny_models["gpt2"], CUT, torch.float32)
    attach_side(ends, gaps, CUT, SHAPE, seed=0, here=False)
    with pytest.raises(UsageError, match="no tap came"):
        ends(input_ids=token_ids(), use_cache=False)
