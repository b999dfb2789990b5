"""What is fetched once, before a run's first step: a bundle of weights.

Knows bundles, messages and what safetensors writes; knows models on the meta device, and no files.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from isthmus.bundle import CHUNK_BYTES, Entry, Kind, Manifest, Scalar
from isthmus.cut import Cut
from isthmus.planning.figures import Crossing
from isthmus.planning.safetensors_size import file_bytes
from isthmus.trust.signing import SIGNATURE_BYTES
from isthmus.wire.frames import sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb

WEIGHTS = "model.safetensors"
DIGEST = "0" * 64
"""Stands for any."""


def weights_bytes(model: nn.Module) -> int:
    """Bytes of the file that `isthmus.weights.save_weights` makes of a model: each tensor once, in its own type."""
    return file_bytes(_saved(model), {"format": "pt"})


def _saved(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    kept = model.state_dict().keys()
    yield from ((name, one) for name, one in model.named_parameters() if name in kept)
    yield from ((name, one) for name, one in model.named_buffers() if name in kept)


def bundle(kind: Kind, cut: Cut, files: Mapping[str, int], about: Mapping[str, Scalar] | None = None) -> Manifest:
    """A bundle of files of these sizes."""
    entries = tuple(Entry(name=name, size=size, sha256=DIGEST) for name, size in sorted(files.items()))
    return Manifest(kind=kind, model_digest=DIGEST, cut=str(cut), about=dict(about or {}), files=entries)


def fetched(manifest: Manifest) -> Crossing:
    """A bundle, from its beginning to its end."""
    first = pb.BundleFrame(manifest=manifest.to_bytes(), signature=bytes(SIGNATURE_BYTES))
    down, offset = sent_bytes(first), manifest.total_bytes // 2
    for entry in manifest.files:
        whole, rest = divmod(entry.size, CHUNK_BYTES)
        down += whole * sent_bytes(pb.BundleFrame(offset=offset, data=bytes(CHUNK_BYTES))) if whole else 0
        down += sent_bytes(pb.BundleFrame(offset=offset, data=bytes(rest))) if rest else 0
    return Crossing(sent_bytes(pb.FetchRequest(bundle=DIGEST)), down)
