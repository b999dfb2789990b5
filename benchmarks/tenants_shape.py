"""A span of a known shape with random weights, served by the engine and called directly.

Knows shapes, the engine and the model's own class; reads no files. It is for devices that a small model leaves idle.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import Figure, Outcome, Target
from benchmarks.tenants_load import Tenant, serve
from cloud_node.in_process import InProcessEngine
from cloud_node.span import Span
from isthmus.blocks import find_blocks, run_blocks
from isthmus.cut import Cut
from isthmus.rows import Rows

SHAPES = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
}
LEAST_SHARE = 0.9
"""Of the tokens a second of the blocks called directly."""

TOKENS, IN_FLIGHT, DECODERS = 2048, 4, 16


@dataclass(frozen=True)
class Shape:
    """What is built, and where: a shape's name, blocks of it, a device and a dtype."""

    name: str
    blocks: int
    device: str
    dtype: str

    def build(self) -> Span:
        """The span, of a model of which it is all blocks."""
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=32, num_hidden_layers=self.blocks, **SHAPES[self.name])
        with torch.device(self.device):
            model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, self.dtype))
        return Span(model.requires_grad_(False).eval(), find_blocks(model), Cut(0, 0))


def measure(shape: Shape, repeats: int, requests: int) -> Outcome:
    """The engine and the blocks in turns, then decoding by one tenant and by many."""
    span = shape.build()
    width = SHAPES[shape.name]["hidden_size"]
    engine = InProcessEngine({span.cut: span}, shape.device, int(width), 1 << 34)
    rows = Rows((TOKENS,), (0,))
    served, direct, one, many = [], [], [], []
    for _ in range(repeats + 1):
        tenants = [Tenant(engine, f"tenant {number}", rows, False) for number in range(IN_FLIGHT)]
        served.append(serve(tenants, requests).tokens_per_s)
        direct.append(_direct(span, int(width), IN_FLIGHT * requests))
        one.append(_decoding(engine, 1, requests))
        many.append(_decoding(engine, DECODERS, requests))
    return _outcome(shape, served[1:], direct[1:], one[1:], many[1:])


def _direct(span: Span, width: int, requests: int) -> float:
    """Tokens a second of the blocks alone, on hidden states that are there already."""
    hidden_BTD = torch.randn(1, TOKENS, width, device=span.device, dtype=span.dtype)

    def run() -> None:
        for _ in range(requests):
            run_blocks(span._base, span._found.blocks, hidden_BTD)
        span.settle()

    with torch.no_grad():
        return requests * TOKENS / _seconds(run)


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _decoding(engine: InProcessEngine, tenants: int, requests: int) -> float:
    rows = Rows((1,), (0,))
    return serve([Tenant(engine, f"writer {number}", rows, True) for number in range(tenants)], requests).tokens_per_s


def _outcome(shape: Shape, served: list[float], direct: list[float], one: list[float], many: list[float]) -> Outcome:
    share = Figure.of([ours / theirs for ours, theirs in zip(served, direct, strict=True)], "of direct calls")
    figures = {
        f"forward through the engine, {IN_FLIGHT} requests of {TOKENS} tokens at once": Figure.of(served, "tokens/s"),
        "forward of the same blocks called directly": Figure.of(direct, "tokens/s"),
        "through the engine against directly": share,
        "decoding, one tenant": Figure.of(one, "tokens/s"),
        f"decoding, {DECODERS} tenants": Figure.of(many, "tokens/s"),
        f"{DECODERS} tenants against one": Figure(statistics.median(many) / statistics.median(one), "times"),
    }
    met = share.value >= LEAST_SHARE
    text = f"at least {LEAST_SHARE:g} of the tokens a second of {shape.blocks} blocks of {shape.name} called directly"
    reason = None if met else "tensors cross between processor and device within a turn"
    return Outcome(figures, (Target(text, str(share), met, reason),))
