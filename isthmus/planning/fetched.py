"""What is fetched once, before a run's first step: a bundle of weights.

Knows bundles, messages and what safetensors writes; knows models on the meta device, and no files.
"""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from isthmus.bundle import CHUNK_BYTES, Entry, Kind, Manifest
from isthmus.cut import Cut
from isthmus.planning.figures import Crossing
from isthmus.trust.signing import SIGNATURE_BYTES
from isthmus.wire.frames import sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb

WEIGHTS = "model.safetensors"
DIGEST = "0" * 64
"""Stands for any."""

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
"""What safetensors calls types."""


def weights_bytes(model: nn.Module) -> int:
    """Bytes of the file that `isthmus.weights.save_weights` makes of a model: each tensor once, in its own type."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in _saved(model):
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = len(json.dumps(entries, separators=(",", ":")))
    return 8 + -(-header // 8) * 8 + end


def _saved(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    kept = model.state_dict().keys()
    yield from ((name, one) for name, one in model.named_parameters() if name in kept)
    yield from ((name, one) for name, one in model.named_buffers() if name in kept)


def bundle(kind: Kind, cut: Cut, files: Mapping[str, int]) -> Manifest:
    """A bundle of files of these sizes."""
    entries = tuple(Entry(name=name, size=size, sha256=DIGEST) for name, size in sorted(files.items()))
    return Manifest(kind=kind, model_digest=DIGEST, cut=str(cut), about={}, files=entries)


def fetched(manifest: Manifest) -> Crossing:
    """A bundle, from its beginning to its end."""
    first = pb.BundleFrame(manifest=manifest.to_bytes(), signature=bytes(SIGNATURE_BYTES))
    down, offset = sent_bytes(first), manifest.total_bytes // 2
    for entry in manifest.files:
        whole, rest = divmod(entry.size, CHUNK_BYTES)
        down += whole * sent_bytes(pb.BundleFrame(offset=offset, data=bytes(CHUNK_BYTES))) if whole else 0
        down += sent_bytes(pb.BundleFrame(offset=offset, data=bytes(rest))) if rest else 0
    return Crossing(sent_bytes(pb.FetchRequest(bundle=DIGEST)), down)
