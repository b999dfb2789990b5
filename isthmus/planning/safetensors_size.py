"""How large a safetensors file is, from the names and shapes of what it holds.

Knows the format (https://github.com/huggingface/safetensors#format); knows no model, and writes nothing.
"""

import json
from collections.abc import Iterable, Mapping

import torch

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


def file_bytes(tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of a file of these tensors, which may be on the meta device."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = len(json.dumps(entries, separators=(",", ":")))
    return 8 + -(-header // 8) * 8 + end
