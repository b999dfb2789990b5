"""What the edge's part of a step costs is told for every shape, also where a method computes weights once a call."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from edge_client.edge_flops import count_edge_flops
from isthmus.ledger.flops import on_meta
from isthmus.training.outputs import wanting
from tests.methods.cases import CUT, FAMILIES, by_name
from tests.methods.test_gradients import placed
from tests.parity.reference import HIDDEN
from tests.parity.test_flops import both_passes, ends_only


@pytest.mark.parametrize("name", ["dora", "loha", "oft", "fourierft", "pissa", "prompt", "p-tuning", "head"])
def test_the_polynomial_is_what_counting_a_shape_directly_finds(name: str, tiny_models: dict[str, Path]) -> None:
    edge = ends_only(tiny_models["llama"], CUT)
    tuning = placed(edge, by_name(name))
    flops, twin = count_edge_flops(edge, tuning), on_meta(tuning.model)
    for rows, tokens, outputs in [(1, 5, 1), (3, 40, 7)]:
        embeds_BTD = torch.empty(rows, tokens, HIDDEN, device="meta")
        wanted_BT = (torch.arange(rows * tokens) < outputs).view(rows, tokens)

        def run(embeds_BTD: torch.Tensor = embeds_BTD, wanted_BT: torch.Tensor = wanted_BT) -> torch.Tensor:
            with wanting(wanted_BT):
                return twin(inputs_embeds=embeds_BTD, past_key_values=DynamicCache(), use_cache=True).logits

        counted = both_passes(run)
        run_tokens = tokens + tuning.virtual_tokens
        fitted = (one.of(rows, run_tokens, outputs=outputs) for one in (flops.forward, flops.backward))
        assert tuple(fitted) == counted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["trainable-tokens", "prompt", "lora"])
def test_a_backward_goes_as_far_down_as_a_real_one_over_token_ids(
    name: str, family: str, tiny_models: dict[str, Path]
) -> None:
    rows, tokens, outputs = 2, 16, 5
    edge = ends_only(tiny_models[family], CUT)
    tuning = placed(edge, by_name(name))
    flops, run_tokens = count_edge_flops(edge, tuning), tokens + tuning.virtual_tokens
    tuning.base.set_attn_implementation("eager")  # the counter takes fused attention on a CPU for nothing
    wanted_BT = pad((torch.arange(tokens) < outputs)[None], (0, 0, 0, rows - 1))

    def run() -> torch.Tensor:
        with wanting(wanted_BT):
            logits: torch.Tensor = tuning.model(input_ids=torch.full((rows, tokens), 75), use_cache=False).logits
        return logits

    forward, backward = both_passes(run)
    assert forward == flops.forward.of(rows, run_tokens, outputs=outputs)
    assert backward == flops.backward.of(rows, run_tokens, outputs=outputs) > 0
