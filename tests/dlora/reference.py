"""Where the linear modules of plain models are, written down by hand, and how tests make a model with ports.

The names come from the families' own code on Hugging Face; nothing here asks the edge or the cloud for them.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from edge_client.assemble import load_local
from edge_client.attaching import Placement, attach
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel
from edge_client.port_adapters import PortAdapters, PortWork
from edge_client.step import Gradients, Stepper
from edge_client.tuning import Tuning
from isthmus.ledger.record import Ledger
from isthmus.linears import Site
from isthmus.training.data import TokenSequence
from isthmus.wire.gen import backbone_pb2 as pb
from tests.harness import Server
from tests.parity.reference import ALPHA, RANK, connected
from tests.parity.test_training import UNCOUNTED, in_microbatches

CUTS = ("1:1", "0:0")
ALL = ["all-linear"]
ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Family:
    """A family's block list, how many blocks the test's model has, and the linear modules of a block.

    Modules that are given the same input stand in one group; groups are in the order that they run.
    """

    path: str
    blocks: int
    groups: tuple[tuple[str, ...], ...]

    @property
    def modules(self) -> list[str]:
        """Names within a block."""
        return [name for group in self.groups for name in group]


LLAMA = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
GPT2 = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
OPT = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",))
NEOX = (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",))

FAMILIES = {
    "llama": Family("model.layers", 6, LLAMA),
    "gpt2": Family("transformer.h", 6, GPT2),
    "qwen3": Family("model.layers", 4, LLAMA),
    "opt": Family("model.decoder.layers", 4, OPT),
    "gpt_neox": Family("gpt_neox.layers", 4, NEOX),
}

SIZES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 64),
    "mlp.up_proj": (32, 64),
    "mlp.down_proj": (64, 32),
}
"""Inputs and outputs of the tiny Llama's modules."""


def span_numbers(family: str, cut: str) -> list[int]:
    """Blocks that the cloud runs."""
    bottom, top = map(int, cut.split(":"))
    return list(range(bottom, FAMILIES[family].blocks - top))


def full_names(family: str, numbers: Sequence[int], targets: Sequence[str] = ALL) -> list[str]:
    """Names from the model's root of the linear modules of some blocks; `targets` are their last names."""
    about = FAMILIES[family]
    chosen = [name for name in about.modules if targets == ALL or name.rpartition(".")[2] in targets]
    return [f"{about.path}.{number}.{name}" for number in numbers for name in chosen]


def every_block(family: str, targets: Sequence[str] = ALL) -> list[str]:
    """The same of all blocks: what `dlora` adapts."""
    return full_names(family, range(FAMILIES[family].blocks), targets)


@contextmanager
def with_ports(
    server: Server,
    cut: str,
    targets: list[str],
    ledger: Ledger | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    **settings: object,
) -> Iterator[tuple[EdgeModel, Tuning]]:
    """An edge with adapters in all blocks, those of the span at ports; all take part."""
    with connected(server, cut, ledger, method="dlora", targets=targets, **settings) as edge:
        tuning = attach(edge.model, edge.found, edge.cut, _placement(targets, dropout, seed))
        ports(edge).attached()
        yield edge, tuning


def in_one_process(
    directory: Path, cut: str, targets: list[str], dropout: float = 0.0, seed: int = 0
) -> tuple[EdgeModel, Tuning]:
    """The same by `--method local --exchange activations`."""
    given = {"method": "local", "exchange": "activations", "data": "unused", "model": str(directory), "cut": cut}
    edge = load_local(TrainConfig.model_validate(given))
    return edge, attach(edge.model, edge.found, edge.cut, _placement(targets, dropout, seed))


def _placement(targets: list[str], dropout: float, seed: int) -> Placement:
    return Placement("lora", RANK, ALPHA, targets, seed, in_span=True, dropout=dropout)


def ports(edge: EdgeModel) -> PortAdapters:
    """The adapters in the span, which must be there."""
    assert edge.adapters is not None
    return edge.adapters


def name_of(site: Site) -> str:
    """What the tuning and the ledger call a port."""
    return f"{site[0]}.{site[1]}"


def activate(edge: EdgeModel, tuning: Tuning, sites: Sequence[Site]) -> dict[str, torch.nn.Parameter]:
    """Let only these ports take part; returns the parameters that have a gradient then."""
    ports(edge).active = frozenset(sites)
    return tuning.without(tuning.ports.keys() - set(map(name_of, sites)))


def park(edge: EdgeModel, tuning: Tuning, sites: Sequence[Site]) -> None:
    """Leave the adapters of some ports with the cloud, frozen."""
    assert edge.remote is not None
    chosen = [tuning.ports[name_of(site)] for site in ports(edge).sites if site in sites]
    values = tuning.trainable
    frozen = [(values[port.down], values[port.up].detach() * port.scale) for port in chosen]
    edge.remote.park(frozen, ports(edge).bitmap(sites))


def gradients(
    edge: EdgeModel,
    tuning: Tuning,
    sequences: Sequence[TokenSequence],
    count: int,
    wanted: dict[str, torch.nn.Parameter] | None = None,
    seed: int = 0,
    step: int = 0,
) -> Gradients:
    """One step's loss and gradients in `count` microbatches; `seed` and `step` are dropout's."""
    stepper = Stepper(edge, tuning, Ledger(), UNCOUNTED, count, seed)
    try:
        return stepper.gradients(in_microbatches(sequences, count), step, wanted)
    finally:
        stepper.close()


def same_bits(one: Gradients, other: Gradients) -> bool:
    """Whether loss and gradients are equal in every bit."""
    assert one.by_name.keys() == other.by_name.keys()
    return one.loss == other.loss and all(torch.equal(one.by_name[name], other.by_name[name]) for name in one.by_name)


@dataclass(frozen=True)
class Asked:
    """A question that the edge was asked, with the shapes of what came and of what it answered."""

    block: int
    modules: tuple[str, ...]
    backward: bool
    wanted: bool
    came: tuple[tuple[int, ...], ...]
    answered: tuple[tuple[int, ...], ...]


def overhear(patch: pytest.MonkeyPatch, before: Callable[[pb.PortCall], None] = lambda _: None) -> list[Asked]:
    """Note every question from now on, in the order of the answers; `before` is called ahead of each."""
    heard: list[Asked] = []
    answer, lock = PortWork.answer, threading.Lock()

    def note(work: PortWork, ask: pb.PortCall, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        before(ask)
        answered = answer(work, ask, tensors)
        shapes = [tuple(tuple(tensor.shape) for tensor in both) for both in (tensors, answered)]
        with lock:
            heard.append(Asked(ask.block, tuple(ask.modules), ask.backward, ask.wanted, *shapes))
        return answered

    patch.setattr(PortWork, "answer", note)
    return heard
