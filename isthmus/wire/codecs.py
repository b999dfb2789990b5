"""How a tensor's values become bytes, and bytes become values again.

Knows dtypes, shapes and four codecs. It refuses to know headers, checksums, messages and who is sending what.

| codec | payload, little-endian, elements in row-major order |
|---|---|
| none | the elements as they are |
| bf16, fp16 | the elements rounded to bfloat16 or float16 |
| int8 | for blocks of 64 elements, the last one shorter: every value as int8, then each block's scale as bfloat16 |
"""

import math
from collections.abc import Mapping, Sequence

import torch

from isthmus.errors import CodecError, WireError

CODECS: tuple[str, ...] = ("none", "bf16", "fp16", "int8")
DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
BLOCK = 64
"""Elements that share one scale in the int8 codec."""

_CARRIERS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST = {
    "none": math.inf,
    "bf16": torch.finfo(torch.bfloat16).max,
    "fp16": torch.finfo(torch.float16).max,
    "int8": torch.finfo(torch.float32).max,
}
_INSTEAD = {"bf16": "none", "fp16": "bf16 or int8", "int8": "none"}


def encoded_size(codec: str, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of the payload of a tensor, exactly, in unbounded integers.

    Raises:
        CodecError: no such codec or dtype, or a lossy codec for a tensor that is not floating.
    """
    if codec not in CODECS:
        raise CodecError(f"no codec {codec!r:.40}; use one of {', '.join(CODECS)}")
    if dtype not in DTYPES.values():
        raise CodecError(f"{dtype} does not travel; use one of {', '.join(DTYPES)}")
    elements = math.prod(shape)
    if codec == "none":
        return elements * dtype.itemsize
    if not dtype.is_floating_point:
        raise CodecError(f"codec {codec} would change a tensor of {dtype}; use none")
    return elements + 2 * -(-elements // BLOCK) if codec == "int8" else 2 * elements


def encode(tensor: torch.Tensor, codec: str) -> memoryview:
    """A tensor's values as contiguous bytes.

    Takes any device, strides and shape. Where nothing needs converting (a contiguous CPU tensor with codec `none`, or
    already of the codec's type) the view aliases the tensor, which must then not change until the bytes are sent.
    With `int8` each value comes back within half its block's scale, beside float rounding: the scale is the block's
    largest magnitude / 127, rounded up to bfloat16, whose range keeps small gradients that float16 scales would
    lose (blockwise absmax quantisation: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022).

    Raises:
        CodecError: the codec does not fit the dtype, or a value is not finite or beyond the codec's range.
    """
    encoded_size(codec, tensor.dtype, tensor.shape)
    # contiguous() and reshape() leave a single element whatever stride it has, which no view as bytes accepts.
    flat = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
    if flat.is_floating_point() and flat.numel():
        _refuse_unfit(_peak(flat), codec)
    if codec == "int8":
        return _bytes_of(_to_blocks(flat))
    return _bytes_of(flat.to(_CARRIERS.get(codec, flat.dtype)))


def decode(
    payload: memoryview | bytes | bytearray, codec: str, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """The CPU tensor of `dtype` and `shape` that a payload carries.

    With codec `none`, or a `dtype` that is the codec's own, the tensor aliases the payload if that is a bytearray or
    a view of one; it owns its memory otherwise.

    Raises:
        CodecError: the codec does not fit the dtype.
        WireError: the payload has the wrong size, a value that is not finite, or a bool that is neither 0 nor 1.
    """
    view = memoryview(payload)
    size = encoded_size(codec, dtype, shape)
    if view.nbytes != size:
        raise WireError(f"payload has {view.nbytes} bytes where {size} were declared; send the tensor again")
    if not size:
        return torch.empty(tuple(shape), dtype=dtype)
    raw = torch.frombuffer(view if isinstance(view.obj, bytearray) else bytearray(view), dtype=torch.uint8)
    if codec == "int8":
        return _fitted(_from_blocks(raw, math.prod(shape)), dtype).reshape(tuple(shape))
    carried = _viewed(raw, _CARRIERS.get(codec, dtype))
    return (carried if codec == "none" else _fitted(carried, dtype)).reshape(tuple(shape))


def _peak(values: torch.Tensor) -> float:
    """The largest magnitude, or NaN if there is one; a single pass without a temporary, unlike `isfinite().all()`."""
    low, high = torch.aminmax(values)
    return float(torch.maximum(-low, high))


def _refuse_unfit(peak: float, codec: str) -> None:
    if not math.isfinite(peak):
        raise CodecError("tensor holds a value that is not finite; lower the learning rate or check the data")
    if peak > _LARGEST[codec]:
        raise CodecError(f"codec {codec} cannot carry {peak:.6g}; use {_INSTEAD[codec]}")


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return flat.cpu().view(torch.uint8).numpy().data


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """`[elements]` as `[blocks, BLOCK]`, the last block padded with zeros."""
    missing = -flat.numel() % BLOCK
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


def _to_blocks(flat: torch.Tensor) -> torch.Tensor:
    """The int8 codec's payload as uint8 `[bytes]`."""
    blocks = _blocks(flat.float())
    scales = _rounded_up(blocks.abs().amax(dim=1) / 127)
    values = (blocks / scales.float().unsqueeze(1)).round_().to(torch.int8)
    return torch.cat([values.view(torch.uint8).view(-1)[: flat.numel()], scales.view(torch.uint8)])


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 to the next bfloat16, its smallest normal at least.

    Rounding down would push the largest value of a block past 127; a scale of zero would divide by it.
    """
    bits = scales.clamp_min(torch.finfo(torch.bfloat16).tiny).view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).bfloat16()


def _from_blocks(raw: torch.Tensor, elements: int) -> torch.Tensor:
    """float32 `[elements]` of the int8 codec's payload."""
    # A copy, because an odd number of values leaves the scales unaligned.
    scales = raw[elements:].clone().view(torch.bfloat16)
    blocks = _blocks(raw[:elements].view(torch.int8)).float().mul_(scales.float().unsqueeze(1))
    return _finite(blocks.view(-1)[:elements])


def _viewed(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Received bytes as `dtype`, copied only if they are not aligned for it, and refused if no sender made them."""
    values = (raw.clone() if raw.data_ptr() % dtype.itemsize else raw).view(dtype)
    if dtype == torch.bool and raw.max() > 1:
        raise WireError("payload holds a bool that is neither 0 nor 1; send the tensor again")
    return _finite(values) if dtype.is_floating_point else values


def _finite(received: torch.Tensor) -> torch.Tensor:
    if not math.isfinite(_peak(received)):
        raise WireError("payload holds a value that is not finite; send finite values only")
    return received


def _fitted(carried: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Carried values as `dtype`, held to its range.

    Rounding near the end of the range may carry a value past it (65504 becomes 65536 in bfloat16, infinite in float16).
    """
    limit = torch.finfo(dtype).max
    if torch.finfo(carried.dtype).max > limit:
        carried = carried.float().clamp(-limit, limit)
    return carried.to(dtype)
