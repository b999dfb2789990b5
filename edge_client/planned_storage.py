"""What a run would leave on the edge's disk: its adapter, its checkpoints, and the outputs that it keeps.

Knows an edge on the meta device, settings and rows; writes nothing. A few hundred bytes of names and hashes that stand
in some files are taken to be so many.
"""

from collections.abc import Sequence

import peft
import torch

from edge_client.adapter_settings import settings_text
from edge_client.config import TrainConfig
from edge_client.edge_model import answers_where_wanted
from edge_client.placed import PlacedEdge
from edge_client.taking_part import policy_of
from edge_client.tuning import Tuning
from isthmus.planning.fetched import bundle
from isthmus.planning.safetensors_size import file_bytes
from isthmus.planning.workload import Workload
from isthmus.training.checkpoints import KEPT
from isthmus.trust.signing import SIGNATURE_BYTES
from isthmus.wire.codecs import encoded_size

FACTS = {"facts": " " * 700}
"""Of a checkpoint: where the run stands, and hashes of what it is made of."""

ENTRY_BYTES = 600
"""Of a row's outputs in the cache, beside the values: hashes, and what they are of."""


def adapter_bytes(placed: PlacedEdge, settings: TrainConfig) -> int:
    """Bytes of the adapter's folder when the run is over, in peft's format or our own."""
    tuning = placed.tuning
    if not isinstance(tuning.model, peft.PeftModel):
        weights = file_bytes(tuning.trainable.items())
        weights -= _dropped_bytes(placed, settings)
        shape = tuning.side or tuning.cores
        about = {"method": tuning.kind, **(vars(shape) if shape is not None else {})}
        manifest = bundle("adapter", placed.cut, {"adapter.safetensors": weights}, about)
        return weights + len(manifest.to_bytes()) + SIGNATURE_BYTES
    weights = file_bytes(_saved(tuning).items(), {"format": "pt"})
    return weights - _dropped_bytes(placed, settings) + len(settings_text(tuning.config()))


def _saved(tuning: Tuning) -> dict[str, torch.Tensor]:
    if not tuning.virtual_tokens:
        return tuning.held()
    embedding_VD = tuning.base.get_input_embeddings().weight
    return {"prompt_embeddings": embedding_VD.new_empty(tuning.virtual_tokens, embedding_VD.shape[1])}


def _dropped_bytes(placed: PlacedEdge, settings: TrainConfig) -> int:
    """Of the ports that Kill-and-Revive has dropped in the end, which are not saved."""
    adapters, tuning = placed.edge.adapters, placed.tuning
    if adapters is None or settings.kr_active is None or settings.kr_idle == "park":
        return 0
    kept = policy_of(settings, adapters, settings.steps or settings.kr_warmup + 1).count
    each = [sum(tuning.trainable[name].nbytes for name in port.parameters) for port in tuning.ports.values()]
    return round(sum(each) * (1 - kept / len(each)))


def checkpoint_bytes(tuning: Tuning) -> int:
    """Bytes of the checkpoints that are kept, at most: the first has no moments, nor have ports that are dropped."""
    tensors = [(name, torch.empty(one.shape, device="meta")) for name, one in tuning.trainable.items()]
    kept = [(f"{kind}/{name}", one) for kind in ("master", "exp_avg", "exp_avg_sq") for name, one in tensors]
    kept += [(f"step/{name}", torch.empty((), device="meta")) for name in tuning.trainable]
    beside = tuning.beside() if not tuning.virtual_tokens else {}  # of a prompt nothing but what trains is saved
    return KEPT * file_bytes([*kept, *beside.items()], FACTS)


def cache_bytes(placed: PlacedEdge, settings: TrainConfig, workload: Workload, rows: int, dtype: torch.dtype) -> int:
    """Bytes of the outputs that are kept of `rows` rows of data, where nothing below the span's end trains.

    Args:
        placed: the edge.
        settings: of the run.
        workload: rows of one batch, which the others are like.
        rows: of the data, those to evaluate on included, that the run meets.
        dtype: what the cloud computes in.
    """
    if not settings.forward_only:
        return 0
    size = placed.edge.model.config.get_text_config().hidden_size
    taps = sum(port.width for port in placed.ports)
    topmost = answers_where_wanted(placed.cut, placed.edge.found)
    returned: Sequence[int] = workload.losses if topmost else workload.lengths
    total = 0
    for tokens, wanted in zip(workload.lengths, returned, strict=True):
        total += ENTRY_BYTES + encoded_size(settings.codec, dtype, (wanted, size))
        total += encoded_size(settings.port_codec, dtype, (tokens, taps)) if taps else 0
    return min(int(settings.cache_limit), round(total * rows / len(workload.lengths)))
