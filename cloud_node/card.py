"""The model card, and the bundles of ends that it names.

Knows a model, its engine and its bundles on disk; knows no peer and no session.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_node.calls import Limits
from cloud_node.engine import EngineCard
from isthmus import PROTOCOL, __version__, bundle
from isthmus.bundle import Manifest
from isthmus.cut import Cut
from isthmus.device import runtime
from isthmus.wire.codecs import CODECS
from isthmus.wire.gen import backbone_pb2 as pb

if TYPE_CHECKING:
    from cloud_node.service import Model


class Ends:
    """The bundles of ends that a node serves, each verified."""

    def __init__(self, ends: Mapping[Cut, Path]) -> None:
        """Verify the bundle of each cut.

        Raises:
            BundleError: one is damaged.
        """
        self._bundles = {cut: (path, bundle.verify(path, None)) for cut, path in ends.items()}

    def find(self, bundle_id: str) -> tuple[Cut, Path, Manifest] | None:
        """The bundle of an id; None: there is none."""
        found = ((cut, path, manifest) for cut, (path, manifest) in self._bundles.items() if manifest.id == bundle_id)
        return next(found, None)

    def offers(self) -> list[pb.CutOffer]:
        """What the card says of them."""
        return [
            pb.CutOffer(bottom=cut.bottom, top=cut.top, ends_bundle=manifest.id, ends_bytes=manifest.total_bytes)
            for cut, (_, manifest) in self._bundles.items()
        ]


def model_card(model: "Model", card: EngineCard, ends: Ends, limits: Limits, identity: str) -> pb.ModelCard:
    """What a peer of this identity is told of a node."""
    return pb.ModelCard(
        protocol=PROTOCOL,
        server_version=__version__,
        model=model.name,
        model_digest=model.digest,
        config_json=model.config_json,
        blocks=model.blocks,
        hidden_size=card.hidden_size,
        dtype=card.dtype,
        cuts=ends.offers(),
        codecs=CODECS,
        limits=limits.to_wire(),
        identity=identity,
        runtime=runtime(card.device),
    )
