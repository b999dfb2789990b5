"""The arithmetic of docs/scaling.md and docs/devices.md is what Isthmus counts, on small models and in the results."""

from pathlib import Path

import pytest
import torch

from benchmarks.needs import INT8, Need, Setting, dlora, side, split, split_again, top
from benchmarks.results import Figure, latest
from benchmarks.scaling import emulator_bytes
from benchmarks.shapes import BFLOAT16, SMOLLM2, Shape
from cloud_node.engine import Opening
from cloud_node.in_process import InProcessEngine
from cloud_node.span import Span
from isthmus.cut import Cut
from isthmus.emulated.forms import Quantised
from isthmus.load import DTYPES, load_ends, load_span
from isthmus.rows import Rows
from isthmus.wire.codecs import encoded_size
from tests.harness import save_tiny_model

CUT, TOKENS, BUDGET = Cut(1, 1), 48, 1 << 30
SHAPE = Shape("small", 64, 4, 4, 2, 160, 259)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "model"
    sizes = {"hidden_size": SHAPE.hidden, "intermediate_size": SHAPE.intermediate, "num_hidden_layers": SHAPE.blocks}
    saved = save_tiny_model(directory, "llama", **sizes)
    assert saved.config.num_attention_heads == SHAPE.heads
    assert saved.config.num_key_value_heads == SHAPE.kv_heads
    assert saved.config.vocab_size == SHAPE.vocabulary
    return directory


def span_of(model: Path, dtype: str) -> Span:
    return Span(*load_span(model, CUT, DTYPES[dtype]), CUT)


def figures(name: str) -> dict[str, Figure]:
    return latest()[name].outcome.figures


def test_flops_of_both_passes_are_those_of_the_ledger(model: Path) -> None:
    counted, blocks = span_of(model, "bfloat16").flops, len(CUT.span(SHAPE.blocks))
    for tokens in (16, 1024):
        assert counted.forward.of(1, tokens) == blocks * tokens * SHAPE.forward_flops(tokens)
        assert counted.backward.of(1, tokens) == blocks * tokens * SHAPE.backward_flops(tokens)
        once = Need(SHAPE, Setting(tokens=tokens), split(SHAPE))
        again = Need(SHAPE, Setting(tokens=tokens), split_again(SHAPE))
        passes = counted.forward.of(1, tokens), counted.backward.of(1, tokens)
        assert once.flops * tokens == sum(passes)
        assert again.flops * tokens == sum(passes) + passes[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_kept_for_a_backward_are_those_that_the_engine_holds(model: Path, dtype: str) -> None:
    span = span_of(model, dtype)
    engine = InProcessEngine({CUT: span}, "cpu", SHAPE.hidden, BUDGET)
    engine.open("one", Opening(CUT))
    engine.forward("one", 1, torch.randn(TOKENS, SHAPE.hidden).to(DTYPES[dtype]), Rows((TOKENS,), (0,)), True)
    value = DTYPES[dtype].itemsize
    rotary = 2 * TOKENS * SHAPE.hidden // SHAPE.heads * value
    assert engine.load().held_bytes == len(span.blocks) * TOKENS * SHAPE.kept_bytes(value) + rotary


def test_a_node_with_a_budget_of_0_keeps_nothing_and_admits_everyone(model: Path) -> None:
    engine = InProcessEngine({CUT: span_of(model, "bfloat16")}, "cpu", SHAPE.hidden, 0)
    for session in ("one", "two", "three"):
        engine.open(session, Opening(CUT))
        for microbatch in (1, 2):
            hidden_ND = torch.randn(TOKENS, SHAPE.hidden)
            assert not engine.forward(session, microbatch, hidden_ND, Rows((TOKENS,), (0,)), True).kept
    assert engine.load().held_bytes == 0
    assert Need(SHAPE, Setting(), split_again(SHAPE)).sessions == float("inf")


def test_bytes_of_a_decode_cache_are_those_of_the_span(model: Path) -> None:
    span = span_of(model, "bfloat16")
    _, state = span.decode(torch.randn(TOKENS, SHAPE.hidden), Rows((TOKENS,), (0,)), None)
    pass_throughs = (SHAPE.blocks - len(span.blocks)) * TOKENS * 2 * BFLOAT16  # of width 1, for Hugging Face's sake
    assert state.size == len(span.blocks) * TOKENS * SHAPE.cached_bytes() + pass_throughs


def test_weights_of_ends_and_span_are_those_that_are_loaded(model: Path) -> None:
    ends, _ = load_ends(model, CUT, torch.bfloat16)
    assert sum(parameter.numel() for parameter in ends.parameters()) == SHAPE.ends(2)
    held = sum(parameter.numel() for parameter in load_span(model, CUT, torch.bfloat16)[0].parameters())
    norms = 2 * SHAPE.hidden * len(CUT.span(SHAPE.blocks))
    assert held - norms == Need(SHAPE, Setting(), split(SHAPE)).weights / BFLOAT16


@pytest.mark.parametrize(("codec", "value"), [("none", BFLOAT16), ("bf16", BFLOAT16), ("int8", INT8)])
def test_bytes_of_a_token_are_those_of_the_codecs(codec: str, value: float) -> None:
    one = encoded_size(codec, torch.bfloat16, (TOKENS, SHAPE.hidden)) / TOKENS
    need = Need(SHAPE, Setting(value_bytes=value), split(SHAPE))
    assert need.up == need.down == 2 * one


def test_a_weight_in_8_bits_takes_what_an_emulators_does() -> None:
    held = Quantised(1024, 256, bias=False, bits=8).bfloat16()
    stored = held.codes.nbytes + held.scale.nbytes
    assert stored == 1024 * 256 * INT8


def test_split_moves_what_was_measured() -> None:
    need = Need(SMOLLM2, Setting(), split(SMOLLM2))
    assert figures("volume-bf16")["bytes per real token"].value == pytest.approx(need.up + need.down, rel=0.001)


def test_train_top_moves_half_of_split_and_side_its_taps_as_was_measured() -> None:
    whole = figures("forward-only/split-2:2-bf16")["tensor bytes, epoch 1"].value
    scale = (split(SMOLLM2).up + split(SMOLLM2).down) / whole
    once = Setting(epochs=1, loss_share=1 / 16)  # about two of a row's tokens
    for name, method in (("top-0:4", top(SMOLLM2, once)), ("side-1/8", side(SMOLLM2, once))):
        moved = figures(f"forward-only/{name}")["tensor bytes, epoch 1"].value
        assert moved * scale == pytest.approx(method.up + method.down, rel=0.001)


def test_dlora_moves_what_was_measured_in_as_many_round_trips() -> None:
    method, row = dlora(SMOLLM2, Setting(loss_share=1 / 16)), figures("dlora/all:0")
    assert row["bytes per real token"].value == pytest.approx(BFLOAT16 * (method.up + method.down), rel=0.001)
    assert row["round trips per step"].value == method.trips


def test_an_emulator_and_its_ends_are_as_large_as_was_measured() -> None:
    assert emulator_bytes(SMOLLM2, 4) / 1e6 == pytest.approx(
        figures("offsite/quant-8")["emulator and ends"].value, rel=0.02
    )
