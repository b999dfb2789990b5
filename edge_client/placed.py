"""An edge's part of a run without weights, on the meta device: what it holds, and what trains where.

Knows settings and a model's configuration, and builds from them by the same code as a run; reads no files and opens no
line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PreTrainedConfig

from edge_client.attaching import attach
from edge_client.cached import Below, Outputs
from edge_client.config import TrainConfig
from edge_client.edge_flops import trains_below
from edge_client.edge_model import EdgeModel
from edge_client.link import Link
from edge_client.middle import ports_of, put_in_the_middle, span_adapters
from edge_client.opening import required
from edge_client.passes import RemoteBackbone
from edge_client.port_adapters import graft
from edge_client.tuning import Tuning
from isthmus.cut import Cut
from isthmus.emulated.recipe import Recipe
from isthmus.errors import UsageError
from isthmus.ledger.record import Ledger
from isthmus.linears import Linear, Site, linears_of
from isthmus.load import DTYPES
from isthmus.planning.placed import Placed, place_emulated, place_ends, place_whole
from isthmus.planning.trainable import DRAWN
from isthmus.ports import Port
from isthmus.training.outputs import select_outputs
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import Encoded


@dataclass(frozen=True)
class PlacedEdge:
    """What a run would have on its edge.

    Attributes:
        edge: the model with whatever stands in its middle; its line is never opened.
        tuning: what trains.
        ports: in the span.
        linears: of the span's blocks, where adapters may stand at them.
        below: what runs below the span when its outputs are asked for once; None where they are not.
    """

    edge: EdgeModel
    tuning: Tuning
    ports: tuple[Port, ...] = ()
    linears: Mapping[Site, Linear] | None = None
    below: Below | None = None

    @cached_property
    def trains_below(self) -> bool:
        """Whether the gradient of the span's input is wanted."""
        return trains_below(self.edge, self.tuning)

    @property
    def cut(self) -> Cut:
        """Where the model is cut."""
        return self.edge.cut


def place_edge(
    settings: TrainConfig, configuration: PreTrainedConfig, steps: int = 1, recipe: Recipe | None = None
) -> PlacedEdge:
    """The edge of a run with these settings, on the meta device.

    Args:
        settings: of the run; the cut must be told.
        configuration: of the whole model.
        steps: of the run.
        recipe: of the emulator, for `--method offsite`.

    Raises:
        CutError, ModelError, BundleError: the model cannot be cut so, or the recipe is another model's.
        UsageError: nothing would train, or a setting that the plan needs is missing.
    """
    cut, (model, found) = _model(settings, configuration, recipe)
    edge = EdgeModel(model, found, cut, None, configuration.model_type, "", settings.dtype)
    ports: tuple[Port, ...] = ()
    linears: Mapping[Site, Linear] = {}
    below = None
    if settings.crosses:
        if settings.in_span:
            linears = linears_of(*place_whole(configuration, model.dtype), cut.span(len(found.blocks)))
        graft(found, linears, model.dtype, model.device)
        ports = ports_of(settings, cut, model, found)
        edge.remote, ledger = _unopened(), Ledger()
        edge.adapters = span_adapters(settings, found, ports, linears, ledger, edge.remote)
        below = Below(model, found, cut) if settings.forward_only else None
        edge.outputs = Outputs(below, edge.remote, _KeepsNothing(), ledger, (), 0, False) if below else None
        put_in_the_middle(found, cut, edge.remote, edge.outputs, ports, edge.adapters)
    select_outputs(model)
    with torch.device("cpu" if settings.peft.upper() in DRAWN else "meta"):
        tuning = attach(model, found, cut, replace(settings.placement, steps=steps))
    if edge.adapters is not None:
        edge.adapters.attached()
    return PlacedEdge(edge, tuning, ports, linears, below)


def _model(settings: TrainConfig, configuration: PreTrainedConfig, recipe: Recipe | None) -> tuple[Cut, Placed]:
    dtype = DTYPES[settings.dtype]
    if settings.method == "offsite":
        if recipe is None:
            raise UsageError("a plan of --method offsite needs an emulator's recipe; give one")
        return Cut.parse(recipe.cut), place_emulated(configuration, recipe, dtype)
    cut = Cut.parse(required(settings.cut, "--cut"))
    if settings.method == "local":
        whole = place_whole(configuration, dtype, settings.head)
        cut.span(len(whole[1].blocks))
        return cut, whole
    return cut, place_ends(configuration, cut, dtype, settings.head)


def _unopened() -> RemoteBackbone:
    """A span that nobody asks: its line is never opened."""
    ledger = Ledger()
    return RemoteBackbone(Link("nowhere:0", None, pb.Open(), ledger, pb.Limits()), ledger, "none", "none")


class _KeepsNothing:
    """No output is looked up while a run is only planned."""

    def get(self, _key: str, /) -> list[torch.Tensor] | None:
        """Nothing."""
        return None

    def put(self, _key: str, _tensors: Sequence[Encoded], /) -> None:
        """Nothing."""
