"""Adapters of modules inside the span whose values cross once a step: trained here, computed with on the cloud.

Knows LoRA layers of `peft` by block and module, which of them take part, and requests by number; knows no optimizer.
The cloud holds the values from `leave` until `gather` has fetched their gradients. Whatever it has lost by then is sent
again, and each backward's gradients count once.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edge_client.dropout import present_draw
from edge_client.passes import RemoteBackbone
from edge_client.port_adapters import ADAPTER, PortAdapters, PortWork, matrices_of
from isthmus.blocks import BlockList
from isthmus.errors import NotKeptError, WireError
from isthmus.ledger.record import Ledger, Phase
from isthmus.linears import Linear, Site
from isthmus.ports import Port
from isthmus.wire.gen import backbone_pb2 as pb

SHOWN = (
    "--exchange parameters shows the cloud this adapter's values inside the span at every step, and their gradients; "
    "weights, optimizer and random state stay here"
)
"""What a run says of itself: it is not trained on the device alone."""

TRIES = 3
"""How often a step's requests are sent again where the cloud has lost what they found."""


class SpanValues(PortAdapters):
    """The adapters in the span, which of them take part, and the way of their values and gradients."""

    def __init__(
        self,
        found: BlockList,
        ports: Sequence[Port],
        linears: Mapping[Site, Linear],
        ledger: Ledger,
        remote: RemoteBackbone,
    ) -> None:
        """Name the ports; `attached` says when `peft` has put its layers there."""
        super().__init__(found, ports, linears, ledger)
        self.anchor = torch.zeros((), requires_grad=True)  # so that the span has a backward in any case
        self._remote = remote
        self._lock = threading.Lock()
        self._backwards: dict[int, tuple[int, Callable[[], object]]] = {}

    def begin(self, phase: Phase) -> PortWork:
        """The work of one request, of which nothing is done here."""
        draw = present_draw()
        return ValuesWork(self, phase, draw.part if draw is not None else 0)

    def leave(self) -> None:
        """Send the values of the adapters that take part now, for all passes until the next `leave` or `gather`."""
        with self._lock:
            self._backwards = {}
        values = [tensor for layer in self._layers() for tensor in _sent(layer)]
        self._remote.attach(values, self.bitmap(self.active))

    def here(self, wanted: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Those of the parameters whose gradients are found on the edge, and what gives the span its backward."""
        inside = {id(parameter) for layer in self.layers.values() for parameter in _parameters(layer)}
        return [*(parameter for parameter in wanted if id(parameter) not in inside), self.anchor]

    def passed(self, microbatch: int, part: int, again: Callable[[], object]) -> None:
        """Note the backward of a part of the batch; `again` sends it again, whole."""
        with self._lock:
            self._backwards[part] = (microbatch, again)

    def gather(self) -> dict[int, torch.Tensor]:
        """Gradients of the values that take part, by the parameter's identity; summed in the order of the parts.

        Raises:
            WireError: the cloud answers with other shapes, or loses them again and again.
        """
        parts = [self._backwards[part] for part in sorted(self._backwards)]
        layers = self._layers()
        if not layers or not parts:
            return {}
        for _ in range(TRIES):
            try:
                found = self._remote.gather([microbatch for microbatch, _ in parts])
                return self._by_parameter(layers, found)
            except NotKeptError:
                self._remote.attach_again()
                for _, again in parts:
                    again()
        raise WireError("the server loses a step's gradients again and again; ask the model owner")

    def _layers(self) -> list[Any]:
        return [self.layers[site] for site in self.sites if site in self.active]

    def _by_parameter(self, layers: Sequence[Any], found: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        due = [tuple(tensor.shape) for layer in layers for tensor in _sent(layer)]
        if [tuple(tensor.shape) for tensor in found] != due:
            raise WireError(
                "the server answered with gradients of other shapes than the adapter's; ask the model owner"
            )
        left = iter(found)
        gradients: dict[int, torch.Tensor] = {}
        for layer in layers:
            for place, parameter in enumerate(_parameters(layer)):
                factor = layer.scaling[ADAPTER] if place == 1 else 1.0  # what crossed was the scale times B
                gradients[id(parameter)] = next(left).to(parameter.device, parameter.dtype) * factor
        return gradients


class ValuesWork(PortWork):
    """One request of a session whose adapters compute on the cloud: it asks nothing of the edge."""

    def __init__(self, adapters: SpanValues, phase: Phase, part: int) -> None:
        super().__init__(adapters, frozenset(), phase)
        self.bitmap = b""  # values name their ports, passes name their values
        self._span, self._part = adapters, part

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What gives the span its backward."""
        return [self._span.anchor]  # type: ignore[list-item]

    def gradients(self) -> list[torch.Tensor]:
        """Of `parameters`: those of values come once a step."""
        return [torch.zeros(())]

    def passed(self, microbatch: int, again: Callable[[], object], /) -> None:
        """The backward is through."""
        self._span.passed(microbatch, self._part, again)

    def answer(self, _: pb.PortCall, __: list[torch.Tensor], /) -> list[torch.Tensor]:
        """Nothing is asked.

        Raises:
            WireError: always.
        """
        raise WireError("the server asked at a port, where it has the values; ask the model owner")


def _parameters(layer: Any) -> list[nn.Parameter]:
    """A layer's parameters in the order that they cross."""
    return list(matrices_of(layer))


def _sent(layer: Any) -> list[torch.Tensor]:
    """What crosses of a layer: down, and up with the scale in it."""
    down, up = matrices_of(layer)
    return [down.detach(), up.detach() * layer.scaling[ADAPTER]]
