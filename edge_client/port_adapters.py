"""Adapters of modules inside the span: they live on the edge and answer what the span asks at their ports.

Knows LoRA layers of `peft`, or cores, by block and module, tensors and the ledger; knows no line and no optimizer.
The modules are the cloud's: hollow ones stand at their places, so that `peft` attaches and saves under real names.
Method: Gao and Zhang, DLoRA (2024), arXiv:2404.05182, as we read it; the paper's code is not public.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_client.core import Core
from edge_client.dropout import drawing, present_draw
from isthmus.blocks import BlockList
from isthmus.errors import WireError
from isthmus.ledger import span_flops
from isthmus.ledger.memory import TensorPeak
from isthmus.ledger.record import Ledger, Phase
from isthmus.linears import Linear, Site
from isthmus.ports import Port
from isthmus.rows import pack_bits
from isthmus.wire.gen import backbone_pb2 as pb

CORE_OF = "core"
"""What a core is called within the module that it belongs to."""

ADAPTER = "default"
"""What `peft` calls an adapter that nobody named."""


def graft(found: BlockList, linears: Mapping[Site, Linear], dtype: torch.dtype, device: torch.device) -> None:
    """Put a hollow module at the place of each linear module that runs on the cloud."""
    for (number, name), linear in linears.items():
        parent, _, last = name.rpartition(".")
        place = found.blocks[number]
        for part in filter(None, parent.split(".")):
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, _hollow(linear, dtype, device))


def _hollow(linear: Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A linear module whose weight is one zero, shown as a matrix: `peft` reads its shape, dtype and device."""
    module: Any
    if linear.transposed:
        module, shape = Conv1D(1, 1), (linear.inputs, linear.outputs)
        module.nf, module.nx, module.bias = linear.outputs, linear.inputs, None
    else:
        module, shape = nn.Linear(1, 1, bias=False), (linear.outputs, linear.inputs)
        module.in_features, module.out_features = linear.inputs, linear.outputs
    module.weight = nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shape), requires_grad=False)
    module.elsewhere = True
    return module  # type: ignore[no-any-return]


def is_elsewhere(module: nn.Module) -> bool:
    """Whether it is a hollow one."""
    return bool(getattr(module, "elsewhere", False))


class PortAdapters:
    """The adapters at a session's ports, and which of them take part."""

    def __init__(self, found: BlockList, ports: Sequence[Port], linears: Mapping[Site, Linear], ledger: Ledger) -> None:
        """Name the ports; `attached` says when `peft` has put its layers there."""
        self.ports = tuple(ports)
        self.linears = dict(linears)
        self.sites: tuple[Site, ...] = tuple((port.block, port.module) for port in ports)
        self.active: frozenset[Site] = frozenset()
        self.memory: TensorPeak | None = None  # who counts what is kept for backwards
        self.ledger = ledger
        self._found = found
        self.layers: dict[Site, Any] = {}

    def __deepcopy__(self, _: dict[int, Any]) -> "PortAdapters":
        """A copied model has the same adapters."""
        return self

    def attached(self) -> None:
        """Look up the layers; from now on all take part."""
        modules = {(number, name): self._found.blocks[number].get_submodule(name) for number, name in self.sites}
        self.layers = {site: getattr(module, CORE_OF, module) for site, module in modules.items()}
        self.active = frozenset(self.sites)

    def begin(self, phase: Phase) -> "PortWork":
        """The work of one request, at the adapters that take part now."""
        return PortWork(self, self.active, phase)

    def leave(self) -> None:
        """Let passes know the values from now on; adapters that answer at ports keep theirs."""

    def bitmap(self, sites: Collection[Site]) -> bytes:
        """Which of the ports are `sites`, as a request names them; empty for all."""
        flags = torch.tensor([site in sites for site in self.sites])
        return b"" if bool(flags.all()) else pack_bits(flags)


class PortWork:
    """What the adapters compute for one request, in both passes, and the gradients that come of it.

    Any question may come twice: it is answered again, and what a site has found replaces what it found before.
    """

    def __init__(self, adapters: PortAdapters, sites: frozenset[Site], phase: Phase) -> None:
        """Work at `sites`, counted under `phase`; masks are those that the calling thread draws now."""
        self.sites = sites
        self.bitmap = adapters.bitmap(sites)
        self.forward_s = 0.0
        self.backward_s = 0.0
        self._adapters = adapters
        self._phase: Phase = phase
        self._draw = present_draw()
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, tuple[str, ...]], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._gradients: dict[int, torch.Tensor] = {}  # by the parameter's identity

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the adapters that take part, in the ports' order: down and up of each, or its core."""
        layers = [self._adapters.layers[site] for site in self._adapters.sites if site in self.sites]
        return [weight for layer in layers for weight in matrices_of(layer)]

    def gradients(self) -> list[torch.Tensor]:
        """Of `parameters`, once the backward is through.

        Raises:
            WireError: the cloud has not asked at a port in its backward.
        """
        try:
            return [self._gradients[id(parameter)] for parameter in self.parameters]
        except KeyError:
            raise WireError("the server's backward left a port out; ask the model owner") from None

    def passed(self, _: int, __: Callable[[], object], /) -> None:
        """The backward of a request is through, and how to ask for it again, whole: what it found is here already."""

    def answer(self, ask: pb.PortCall, tensors: list[torch.Tensor], /) -> list[torch.Tensor]:
        """What is due at ports of one block that share their input.

        Raises:
            WireError: no such ports take part, or the tensors do not fit them.
        """
        place, modules = f"{ask.block}", tuple(ask.modules)
        sites = [(ask.block, name) for name in modules]
        if not sites or len(set(sites)) < len(sites) or not self.sites.issuperset(sites):
            raise WireError(f"the server asked at ports of block {place:.20} that take no part; ask the model owner")
        began = time.perf_counter()
        with self._lock:
            answer = self._backward(ask, sites, tensors) if ask.backward else self._forward(ask, sites, tensors)
            spent = time.perf_counter() - began
            if ask.backward:
                self.backward_s += spent
            else:
                self.forward_s += spent
        ledger = self._adapters.ledger
        # Of the edge's seconds, those at this block; the whole is counted by whoever waits for the request.
        ledger.add(self._phase, at=place, **{f"edge_{'backward' if ask.backward else 'forward'}_s": spent})
        return answer

    def _forward(self, ask: pb.PortCall, sites: list[Site], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        layers = [self._adapters.layers[site] for site in sites]
        inputs = inputs_of(layers)
        if [(t.dim(), *t.shape[1:]) for t in tensors] != [(2, width) for width in inputs]:
            raise WireError(f"the server sent {[tuple(t.shape) for t in tensors]} to ports of {inputs} inputs")
        came = [tensor.to(matrices_of(layers[0])[0].device) for tensor in tensors]
        memory = self._adapters.memory
        saving = memory.saving(anew=False) if memory is not None and ask.wanted else nullcontext()
        with torch.set_grad_enabled(ask.wanted), drawing(self._draw), saving:
            for tensor in came:
                tensor.requires_grad_(ask.wanted)
            added = [added_by(layer, came[min(number, len(came) - 1)]) for number, layer in enumerate(layers)]
        if ask.wanted:
            self._kept[ask.block, tuple(ask.modules)] = (came, added)
        for site, layer in zip(sites, layers, strict=True):
            self._count(site, "edge_forward_flops", span_flops.answer_forward(len(came[0]), *sizes_of(layer)))
        return [part.detach() for part in added]

    def _backward(self, ask: pb.PortCall, sites: list[Site], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        kept = self._kept.get((ask.block, tuple(ask.modules)))
        if kept is None or [tuple(t.shape) for t in tensors] != [tuple(part.shape) for part in kept[1]]:
            raise WireError("the server's backward asks at a port otherwise than its forward; ask the model owner")
        came, added = kept
        layers = [self._adapters.layers[site] for site in sites]
        parameters = [weight for layer in layers for weight in matrices_of(layer)]
        outward = [grad.to(part.device, part.dtype) for grad, part in zip(tensors, added, strict=True)]
        wanted = [*parameters, *came] if ask.wanted else parameters
        with torch.autograd.set_multithreading_enabled(False):
            found = torch.autograd.grad(added, wanted, outward, retain_graph=True)  # the question may come again
        self._gradients |= {id(weight): grad for weight, grad in zip(parameters, found, strict=False)}
        for site, layer in zip(sites, layers, strict=True):
            counted = span_flops.answer_backward(len(came[0]), *sizes_of(layer), ask.wanted)
            self._count(site, "edge_backward_flops", counted)
        return list(found[len(parameters) :])

    def _count(self, site: Site, figure: str, flops: int) -> None:
        self._adapters.ledger.add_at(self._phase, f"{site[0]}.{site[1]}", **{figure: flops})


def matrices_of(layer: Any) -> tuple[nn.Parameter, ...]:
    """A layer's down [R, I] and up [O, R], or its core [R, R]."""
    if isinstance(layer, Core):
        return (layer.weight,)
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def sizes_of(layer: Any) -> tuple[int, int]:
    """Values of a layer's down and up, or of its core and nothing."""
    down, *up = (matrix.numel() for matrix in matrices_of(layer))
    return down, sum(up)


def inputs_of(layers: Sequence[Any]) -> list[int]:
    """Values a token of each tensor that comes to layers whose modules share an input."""
    if isinstance(layers[0], Core):
        return [len(layer.weight) for layer in layers]
    return [layers[0].in_features]


def added_by(layer: Any, hidden_NI: torch.Tensor) -> torch.Tensor:
    """What a LoRA layer of `peft` adds to its module's output, or a core makes of its input; in its dtype."""
    if isinstance(layer, Core):
        return layer.answered(hidden_NI)
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    dropped = layer.lora_dropout[ADAPTER](hidden_NI.to(down.weight.dtype))
    added: torch.Tensor = up(down(dropped)) * layer.scaling[ADAPTER]
    return added.to(hidden_NI.dtype)
