"""In a session that only runs forward the cloud builds no graph and keeps nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cloud_node.engine import Opening
from cloud_node.in_process import InProcessEngine
from cloud_node.loading import load_spans
from cloud_node.span import Span
from isthmus.cut import Cut
from isthmus.ports import Port
from isthmus.rows import Rows
from tests.conftest import FAMILIES
from tests.parity.reference import BLOCKS, HIDDEN

CUT = Cut(1, 1)
ROWS = Rows((9, 5), (0, 0))
PORTS: tuple[tuple[Port, ...], ...] = ((), (Port(1, 8), Port(3, HIDDEN)))


class Watch:
    """What every module of a span's model saw while it ran."""

    def __init__(self, span: Span) -> None:
        self.ran: set[nn.Module] = set()
        self.graded: list[str] = []
        for name, module in span._base.named_modules():
            module.register_forward_hook(lambda module, _, output, name=name: self._look(name, module, output))

    def _look(self, name: str, module: nn.Module, output: Any) -> None:
        self.ran.add(module)
        parts = output if isinstance(output, tuple) else (output,)
        leaves = [*(part for part in parts if isinstance(part, torch.Tensor)), *module.parameters(recurse=False)]
        if torch.is_grad_enabled() or any(leaf.requires_grad for leaf in leaves):
            self.graded.append(name)


def hidden() -> torch.Tensor:
    return torch.randn(ROWS.tokens, HIDDEN, generator=torch.Generator().manual_seed(1))


def watched(directory: Path, ports: Sequence[Port]) -> tuple[InProcessEngine, Span, Watch]:
    """An engine with a session, its span, and what its modules see."""
    spans = load_spans(directory, [CUT], torch.float32, torch.device("cpu"))
    engine = InProcessEngine(spans, "cpu", HIDDEN, 1 << 30)
    engine.open("forward only", Opening(CUT, tuple(ports)))
    return engine, spans[CUT], Watch(spans[CUT])


@pytest.mark.parametrize("ports", PORTS, ids=["without taps", "with taps"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_and_no_activation_of_the_span_requires_a_gradient_and_nothing_is_kept(
    tiny_models: dict[str, Path], family: str, ports: Sequence[Port]
) -> None:
    engine, span, watch = watched(tiny_models[family], ports)
    before = engine.load().peak_bytes
    with torch.enable_grad():
        for number in range(3):
            answer = engine.forward("forward only", number, hidden().requires_grad_(), ROWS, keep=False)
            tensors = [answer.tensor_KD] if answer.taps_NW is None else [answer.tensor_KD, answer.taps_NW]
            assert (len(tensors) == 2) == bool(ports)
            assert not any(tensor.requires_grad for tensor in tensors)
            assert all(tensor.grad_fn is None for tensor in tensors)
            assert not answer.kept
            assert answer.work.backward_flops == answer.work.recompute_flops == 0
    blocks = [module for module in watch.ran if type(module).__name__.endswith(("DecoderLayer", "Block"))]
    assert len(blocks) == len(CUT.span(BLOCKS)), "every block of the span was looked at"
    assert watch.graded == []
    assert not any(parameter.requires_grad for parameter in span._base.parameters())
    assert engine.load().peak_bytes == before
    assert engine._store.held_bytes == 0


def test_a_forward_that_a_backward_follows_is_seen_to_build_a_graph_and_to_be_kept(
    tiny_models: dict[str, Path],
) -> None:
    engine, _, watch = watched(tiny_models["llama"], ())
    before = engine.load().peak_bytes
    assert engine.forward("forward only", 1, hidden(), ROWS, keep=True).kept
    assert watch.graded
    assert engine.load().peak_bytes > before
    assert engine._store.held_bytes > 0


def test_a_session_with_taps_keeps_nothing_even_if_asked_to(tiny_models: dict[str, Path]) -> None:
    engine, _, watch = watched(tiny_models["llama"], PORTS[1])
    assert not engine.forward("forward only", 1, hidden(), ROWS, keep=True).kept
    assert watch.graded == []
    assert engine._store.held_bytes == 0
