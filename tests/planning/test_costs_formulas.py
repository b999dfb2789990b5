"""Plans of well-known models against closed formulas and the figures that papers and our own pages quote.

Two FLOPs per multiply-add. N tokens of all rows, T of each, D hidden size, K positions that carry loss.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_client.config import TrainConfig
from edge_client.planned import Planned
from isthmus.cut import Cut
from isthmus.emulated.recipe import Recipe
from isthmus.planning.configurations import find, read
from isthmus.planning.placed import place_ends, place_whole
from isthmus.planning.workload import Workload

CAUSAL = (
    "gemma-2-9b",
    "gpt2",
    "llama-3-70b",
    "llama-3-8b",
    "mistral-7b",
    "opt-1.3b",
    "opt-6.7b",
    "qwen3-32b",
    "qwen3-4b",
)
T, D7 = 512, 4096
FOUR_ROWS = Workload(lengths=(T,) * 4, losses=(T,) * 4)
"""2,048 tokens."""

N = 4 * T
BF16 = {"dtype": "bfloat16"}


def told(method: str, cut: str = "2:2", **settings: Any) -> TrainConfig:
    given = {"method": method, "cut": cut, "data": Path("rows"), "server": "plan:0", **BF16, **settings}
    return TrainConfig.model_validate(given)


def plan(model: str, settings: TrainConfig, **more: Any) -> Planned:
    return Planned(settings, read(find(model)), span_dtype="bfloat16", **more)


def linear_parameters(block: nn.Module) -> int:
    return sum(one.weight.numel() for one in block.modules() if isinstance(one, nn.Linear | Conv1D))


@pytest.mark.parametrize("model", CAUSAL)
def test_a_frozen_span_computes_two_operations_a_weight_and_token_in_either_pass_and_attention(model: str) -> None:
    configuration = read(find(model))
    text = configuration.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    _, found = place_whole(configuration, torch.bfloat16)
    blocks = [found.blocks[number] for number in Cut(2, 2).span(len(found.blocks))]
    linears = 2 * N * sum(map(linear_parameters, blocks))
    attention = len(blocks) * 4 * 4 * T**2 * width
    cloud = plan(model, told("split")).costs(FOUR_ROWS).first.cloud
    assert cloud.forward == pytest.approx(linears + attention, rel=0.01)
    assert cloud.backward == pytest.approx(linears + 2 * attention, rel=0.01)


@pytest.mark.parametrize("losses", [T, 3])
def test_ends_whose_weights_all_train_compute_twice_as_much_backwards(losses: int) -> None:
    model, found = place_ends(read(find("llama-7b")), Cut(2, 2), torch.bfloat16)
    linears = 2 * N * sum(linear_parameters(found.blocks[number]) for number in (0, 1, 30, 31))
    attention = 4 * 4 * 4 * T**2 * D7
    head = 2 * 4 * losses * model.get_output_embeddings().weight.numel()
    workload = Workload(FOUR_ROWS.lengths, (losses,) * 4)
    edge = plan("llama-7b", told("split", peft="full")).costs(workload).first.edge
    assert edge.forward == pytest.approx(linears + attention + head, rel=0.01)
    assert edge.backward == pytest.approx(2 * linears + 2 * attention + head, rel=0.01)


@pytest.mark.parametrize(("codec", "value_bytes"), [("none", 2), ("bf16", 2), ("fp16", 2), ("int8", 1 + 2 / 64)])
def test_split_moves_four_hidden_states_a_token(codec: str, value_bytes: float) -> None:
    crossing = plan("llama-7b", told("split", codec=codec)).costs(FOUR_ROWS).first.crossing
    assert crossing.up_bytes == pytest.approx(2 * D7 * N * value_bytes, rel=0.01)
    assert crossing.down_bytes == pytest.approx(2 * D7 * N * value_bytes, rel=0.01)
    assert crossing.round_trips == 2


def test_each_side_sends_in_what_it_computes_in() -> None:
    mixed = Planned(told("split"), read(find("gpt2")), span_dtype="float32").costs(FOUR_ROWS).first.crossing
    assert mixed.up_bytes == pytest.approx(2 * 768 * N * 2, rel=0.01)
    assert mixed.down_bytes == pytest.approx(2 * 768 * N * 4, rel=0.01)


def test_where_no_block_stands_above_the_span_only_positions_that_carry_loss_come_back() -> None:
    workload = Workload(FOUR_ROWS.lengths, (8,) * 4)
    crossing = plan("llama-7b", told("split", "2:0")).costs(workload).first.crossing
    assert crossing.up_bytes == pytest.approx(2 * D7 * (N + 32), rel=0.01)
    assert crossing.down_bytes == pytest.approx(2 * D7 * (32 + N), rel=0.01)


def test_no_gradient_crosses_where_nothing_below_the_span_trains() -> None:
    step = plan("llama-7b", told("split", "0:2")).costs(FOUR_ROWS).first
    assert step.crossing.round_trips == 1
    assert step.cloud.backward == 0
    assert step.crossing.up_bytes == pytest.approx(2 * D7 * N, rel=0.01)


def test_more_microbatches_are_more_round_trips_for_the_same_bytes() -> None:
    one, four = (plan("llama-7b", told("split", microbatches=count)).costs(FOUR_ROWS).first for count in (1, 4))
    assert four.crossing.round_trips == 4 * one.crossing.round_trips == 8
    assert four.crossing.up_bytes == pytest.approx(one.crossing.up_bytes, rel=0.01)
    assert four.cloud.forward == pytest.approx(one.cloud.forward, rel=1e-6)


TAPPED: Mapping[str, Any] = {"tap_every": 4, "tap_width": 64}


@pytest.mark.parametrize(("method", "settings", "taps"), [("split", {"train": "top"}, 0), ("side", TAPPED, 6 * 64)])
def test_methods_above_the_span_move_each_row_once_and_no_gradient(
    method: str, settings: Mapping[str, Any], taps: int
) -> None:
    costs = plan("llama-7b", told(method, **settings)).costs(FOUR_ROWS)
    assert costs.first.crossing.up_bytes == pytest.approx(2 * D7 * N, rel=0.01)
    assert costs.first.crossing.down_bytes == pytest.approx(2 * (D7 + taps) * N, rel=0.01)
    assert (costs.later.crossing.up_bytes, costs.later.crossing.down_bytes, costs.later.cloud.forward) == (0, 0, 0)
    assert costs.first.cloud.backward == 0 < costs.later.edge.backward
    assert costs.training(steps=30, steps_per_epoch=10).crossing == costs.first.crossing * 10


def test_dlora_on_a_7b_model_costs_what_the_design_says() -> None:
    """All 32 blocks, LoRA of rank 8 at queries and values, 2,048 tokens of 2 bytes a value."""
    costs = plan("llama-7b", told("dlora", "0:0")).costs(FOUR_ROWS)
    moved = costs.first.crossing.up_bytes + costs.first.crossing.down_bytes
    assert moved == pytest.approx(3.3e9, rel=0.02)
    assert moved == pytest.approx(2 * N * D7 * (32 * 6 + 4 - 2), rel=0.01)  # no gradient of the lowest inputs
    assert costs.first.crossing.round_trips == 64 + 2
    assert costs.trained.adapter == 32 * 2 * 8 * 2 * D7
    split = plan("llama-7b", told("split")).costs(FOUR_ROWS).first.crossing
    assert split.up_bytes + split.down_bytes == pytest.approx(67e6, rel=0.01)


def test_few_ports_kept_alive_move_that_share_and_all_are_alive_in_the_warm_up() -> None:
    kept = told("dlora", "0:0", kr_active=0.125, kr_criterion="top", steps=100)
    few, every = plan("llama-7b", kept).costs(FOUR_ROWS), plan("llama-7b", told("dlora", "0:0")).costs(FOUR_ROWS)
    assert few.first.crossing.round_trips == 4 * 2 + 2  # the highest 8 of 64 ports stand in 4 blocks
    unreached = 2 * N * 3 * D7**2  # the lowest block's queries, keys and values need no input's gradient
    attention = 4 * 4 * 4 * T**2 * D7
    reached = every.first.cloud.forward * 4 / 32 + attention - unreached
    assert few.first.cloud.backward == pytest.approx(reached, rel=0.01)
    warm = told("dlora", "0:0", kr_active=0.125, kr_warmup=10, steps=20)
    half = plan("llama-7b", warm).costs(FOUR_ROWS).first.crossing.round_trips
    assert every.first.crossing.round_trips / 2 < half < every.first.crossing.round_trips


def test_a_run_as_long_as_many_periods_costs_as_its_later_periods() -> None:
    short, long = (
        plan("gpt2", told("dlora", kr_active=0.25, steps=steps)).costs(FOUR_ROWS).first.crossing.round_trips
        for steps in (125, 100_000)
    )
    settled = (short * 125 - (2 + 8 * 2) * 5) / 120
    assert long == pytest.approx(settled, rel=0.05)


def test_offsite_fetches_ends_and_emulator_and_moves_nothing_more() -> None:
    blocks = tuple(number if number % 2 else None for number in range(2, 30))
    recipe = Recipe(method="drop", cut="2:2", blocks=blocks)
    costs = plan("llama-7b", told("offsite", emulator="half"), emulator=recipe).costs(FOUR_ROWS)
    ends = plan("llama-7b", told("split")).costs(FOUR_ROWS).fetch.down_bytes
    _, found = place_whole(read(find("llama-7b")), torch.bfloat16)
    kept = 14 * sum(one.nbytes for one in found.blocks[2].parameters())
    assert costs.fetch.down_bytes == pytest.approx(ends + kept, rel=0.01)
    assert costs.first.crossing.up_bytes == costs.first.crossing.down_bytes == costs.first.cloud.forward == 0


def test_a_plan_of_70b_holds_no_weights_and_its_ends_are_fetched_as_they_are_stored() -> None:
    found = plan("llama-3-70b", told("dlora", kr_active=0.125, steps=50))
    assert found.span is not None
    for model in (found.placed.tuning.model, found.span.model):
        assert {one.device.type for one in (*model.parameters(), *model.buffers())} == {"meta"}
    ends, _ = place_ends(read(find("llama-3-70b")), Cut(2, 2), torch.bfloat16)
    stored = sum(one.nbytes for one in ends.parameters())
    assert found.costs(FOUR_ROWS).fetch.down_bytes == pytest.approx(stored, rel=0.01)
