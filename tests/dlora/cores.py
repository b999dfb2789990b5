"""Cores written down by hand, in one plain model; nothing is asked of the edge or the cloud but what was drawn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_client.attaching import attach
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel
from edge_client.tuning import Tuning
from isthmus.ledger.record import Ledger
from tests.dlora.reference import every_block, ports
from tests.harness import Server
from tests.parity.reference import ALPHA, connected, whole_model

LINEAR = "all-linear"


@contextmanager
def with_cores(
    server: Server, cut: str, rank: int, init: str, ledger: Ledger | None = None, **settings: Any
) -> Iterator[tuple[EdgeModel, Tuning]]:
    """An edge with cores in all blocks, those of the span at ports; all take part."""
    given = {"rank": rank, "init": init, "alpha": ALPHA, "targets": [LINEAR], "exchange": "core", **settings}
    config = TrainConfig.model_validate({"method": "dlora", "data": "unused", "server": "unused:1", **given})
    with connected(server, cut, ledger, method="dlora", **given) as edge:
        tuning = attach(edge.model, edge.found, edge.cut, config.placement)
        ports(edge).attached()
        yield edge, tuning


class ByHand(nn.Module):
    """A linear module of a plain model, with a core between factors of its own."""

    def __init__(self, plain: nn.Module, down_RI: torch.Tensor, up_OR: torch.Tensor) -> None:
        super().__init__()
        self.plain, self.down_RI, self.up_OR = plain, down_RI, up_OR
        self.core = nn.Module()
        self.core.weight = nn.Parameter(torch.zeros(len(down_RI), len(down_RI)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight_OI = self.up_OR @ self.core.weight @ self.down_RI * (ALPHA / len(self.down_RI))
        output: torch.Tensor = self.plain(hidden) + hidden @ weight_OI.T
        return output


def by_hand(
    home: Path, family: str, rank: int, values: dict[str, torch.Tensor], drawn: dict[str, Any] | None = None
) -> nn.Module:
    """The whole model with cores of these values: around W's singular vectors, or what was `drawn` by module."""
    model = whole_model(home)
    for name in every_block(family):
        parent, _, last = name.rpartition(".")
        plain = model.get_submodule(name)
        assert isinstance(plain.weight, torch.Tensor)
        weight_OI = plain.weight.T if family == "gpt2" else plain.weight
        factors = singular(weight_OI, rank) if drawn is None else drawn[name]
        wrapped = ByHand(plain, *factors)
        wrapped.core.weight.data.copy_(values[f"{name}.core.weight"])
        setattr(model.get_submodule(parent), last, wrapped)
    return model


def singular(weight_OI: torch.Tensor, rank: int) -> Sequence[torch.Tensor]:
    """W's first right singular vectors, the greatest value of each positive, and what W makes of them."""
    vectors_RI = torch.linalg.svd(weight_OI.detach())[2][:rank]
    at = vectors_RI.abs().argmax(1)
    down_RI = vectors_RI * torch.sign(vectors_RI[torch.arange(rank), at])[:, None]
    return down_RI, weight_OI.detach() @ down_RI.T
