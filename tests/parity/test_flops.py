"""The ledger's FLOPs are those of closed formulas and of counting each shape directly, for span and edge.

Formulas count two FLOPs per multiply-add. B rows, T tokens, K outputs, D hidden size, V vocabulary, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from cloud_node.span import Span
from edge_client.edge_flops import count_edge_flops
from edge_client.edge_model import EdgeModel
from edge_client.step import Stepper
from edge_client.tuning import Tuning
from isthmus.blocks import inject_at, injecting
from isthmus.cut import Cut
from isthmus.ledger.flops import on_meta
from isthmus.ledger.record import Ledger
from isthmus.load import load_ends, load_span
from isthmus.training.collate import Batch
from isthmus.training.outputs import select_outputs, wanting
from tests.conftest import CUTS, FAMILIES
from tests.harness import Server, byte_tokenizer
from tests.parity.reference import HIDDEN, RANK, attached, connected, end_blocks, ragged_sequences

D, R, V = HIDDEN, RANK, 259
SHAPES = [(1, 1, 1), (1, 8, 3), (2, 5, 10), (3, 21, 7), (4, 64, 200), (1, 200, 1)]
"""(B, T, K); none but the second is near a shape that the polynomial was fitted to."""


@dataclass(frozen=True)
class Block:
    """Sizes (inputs, outputs) of a block's linears: those before attention by name, and those behind it."""

    before: dict[str, tuple[int, int]]
    behind: tuple[tuple[int, int], ...]
    adapted: tuple[str, ...]

    @property
    def linears(self) -> int:
        """Forward FLOPs of one token."""
        return sum(2 * inputs * outputs for inputs, outputs in (*self.before.values(), *self.behind))

    @property
    def adapters(self) -> int:
        """Forward FLOPs of one token in the LoRA factors."""
        return sum(2 * R * sum(self.before[name]) for name in self.adapted)


LLAMA = Block(
    {"q_proj": (D, D), "k_proj": (D, D // 2), "v_proj": (D, D // 2)},
    ((D, D), (D, 2 * D), (D, 2 * D), (2 * D, D)),
    ("q_proj", "v_proj"),
)
GPT2 = Block({"c_attn": (D, 3 * D)}, ((D, D), (D, 4 * D), (4 * D, D)), ("c_attn",))
BLOCK = {"llama": LLAMA, "gpt2": GPT2}


def span_formula(family: str, blocks: int, rows: int, tokens: int) -> tuple[int, int]:
    """Forward and backward: the weights are frozen, so the linears cost the same again and attention twice."""
    linears, attention = tokens * BLOCK[family].linears, 4 * tokens**2 * D
    return rows * blocks * (linears + attention), rows * blocks * (linears + 2 * attention)


def edge_formula(family: str, cut: str, rows: int, tokens: int, outputs: int) -> tuple[int, int]:
    """Both passes of the ends with the family's usual LoRA; nothing below the lowest adapter gets a gradient."""
    block, count = BLOCK[family], len(end_blocks(cut))
    if not count:
        return head_formula(outputs)
    attention = 4 * tokens**2 * D
    forward = rows * count * (tokens * (block.linears + block.adapters) + attention)
    backward = rows * count * (tokens * (block.linears + 2 * block.adapters) + 2 * attention)
    unasked = sum(2 * inputs * size for inputs, size in block.before.values())
    unasked += sum(2 * R * block.before[name][0] for name in block.adapted)
    if "k_proj" in block.before:  # the lowest block's keys carry no adapter, so no gradient goes to them either
        unasked += 2 * tokens * D
    head = 2 * outputs * D * V
    return forward + head, backward - rows * tokens * unasked + head


def head_formula(outputs: int) -> tuple[int, int]:
    """LoRA on the head alone: forward through the head; backward to its two factors and no further."""
    return 2 * outputs * (D * V + R * (D + V)), 2 * outputs * (R * V + R * V + R * D)


def both_passes(run: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Count one call and its backward directly."""
    with FlopCounterMode(display=False) as forward:
        result = run()
    with FlopCounterMode(display=False) as backward:
        result.backward(torch.ones_like(result))
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("cut", ["1:1", "0:0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_spans_polynomial_is_the_closed_formula_and_what_counting_real_passes_finds(
    tiny_models: dict[str, Path], family: str, cut: str
) -> None:
    place, blocks = Cut.parse(cut), 6 - len(end_blocks(cut))
    flops = Span(*load_span(tiny_models[family], place, torch.float32), place).flops
    model, found = load_span(tiny_models[family], place, torch.float32)
    model.set_attn_implementation("eager")  # the counter takes fused attention on a CPU for nothing
    inject_at(found.blocks[place.bottom])

    def run(rows: int, tokens: int) -> torch.Tensor:
        hidden_BTD = torch.randn(rows, tokens, D, requires_grad=True)
        with injecting(hidden_BTD):
            output: torch.Tensor = model.base_model(
                inputs_embeds=hidden_BTD.detach(), use_cache=False
            ).last_hidden_state
        return output

    for rows, tokens, _ in SHAPES:
        fitted = flops.forward.of(rows, tokens), flops.backward.of(rows, tokens)
        assert fitted == span_formula(family, blocks, rows, tokens)
        assert fitted == both_passes(lambda rows=rows, tokens=tokens: run(rows, tokens))  # type: ignore[misc]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_counts_the_new_tokens_against_the_whole_context(tiny_models: dict[str, Path], family: str) -> None:
    flops = Span(*load_span(tiny_models[family], Cut(1, 1), torch.float32), Cut(1, 1)).flops
    expected = 3 * 4 * (2 * BLOCK[family].linears + 4 * 2 * 13 * D)
    assert flops.forward.of(3, 2, context=13) == expected


def ends_only(directory: Path, cut: str) -> EdgeModel:
    """An edge without a server: pass-throughs stand where the span was, and cost nothing."""
    model, found = load_ends(directory, Cut.parse(cut), torch.float32)
    select_outputs(model)
    return EdgeModel(model, found, Cut.parse(cut), byte_tokenizer(), "tiny", "", "float32")


def counted_directly(tuning: Tuning, rows: int, tokens: int, outputs: int) -> tuple[int, int]:
    twin: nn.Module = on_meta(tuning.model)
    embeds_BTD = torch.empty(rows, tokens, D, device="meta")
    wanted_BT = (torch.arange(rows * tokens) < outputs).view(rows, tokens)

    def run() -> torch.Tensor:
        with wanting(wanted_BT):
            logits: torch.Tensor = twin(inputs_embeds=embeds_BTD, past_key_values=DynamicCache(), use_cache=True).logits
        return logits

    return both_passes(run)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_edges_polynomial_is_the_closed_formula_and_what_direct_counting_finds(
    tiny_models: dict[str, Path], family: str, cut: str
) -> None:
    edge = ends_only(tiny_models[family], cut)
    tuning = attached(edge)
    flops = count_edge_flops(edge, tuning)
    for rows, tokens, outputs in SHAPES:
        fitted = flops.forward.of(rows, tokens, outputs=outputs), flops.backward.of(rows, tokens, outputs=outputs)
        assert fitted == edge_formula(family, cut, rows, tokens, outputs)
        assert fitted == counted_directly(tuning, rows, tokens, outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_above_the_span_alone_cost_no_backward_below_it(tiny_models: dict[str, Path], family: str) -> None:
    at_head = ends_only(tiny_models[family], "2:1")
    flops = count_edge_flops(at_head, attached(at_head, targets=["lm_head"]))
    assert flops.backward.of(3, 9, outputs=5) == head_formula(5)[1]
    # The blocks run forward all the same.
    blocks = 3 * 3 * (9 * BLOCK[family].linears + 4 * 9**2 * D)
    assert flops.forward.of(3, 9, outputs=5) == blocks + head_formula(5)[0]

    above, below = (
        count_edge_flops(edge, attached(edge)).backward.of(3, 9, outputs=5)
        for edge in (ends_only(tiny_models[family], "0:1"), ends_only(tiny_models[family], "1:1"))
    )
    assert below - above == 3 * (9 * (BLOCK[family].linears + 2 * BLOCK[family].adapters) + 8 * 9**2 * D)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_over_the_wire_enters_these_figures_for_both_sides(servers: dict[str, Server], family: str) -> None:
    batch, ledger = Batch.of(ragged_sequences((9, 17, 5, 12))), Ledger()
    with connected(servers[family], "1:1", ledger=ledger) as edge:
        tuning = attached(edge)
        stepper = Stepper(edge, tuning, ledger, count_edge_flops(edge, tuning), 1)
        stepper.gradients([batch])
        stepper.close()
    spent = ledger.totals("train")
    edges = spent["edge_forward_flops"], spent["edge_backward_flops"]
    assert edges == edge_formula(family, "1:1", 4, 16, batch.counted)
    assert (spent["cloud_forward_flops"], spent["cloud_backward_flops"]) == span_formula(family, 4, 4, 16)
