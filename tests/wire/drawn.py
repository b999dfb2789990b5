"""Tensors that hypothesis draws: any dtype, shape and memory layout, and values to the ends of what may travel.

Knows nothing of codecs but the largest value that each may carry.
"""

from collections.abc import Callable

import torch
from hypothesis import strategies as st

from isthmus.wire.codecs import CODECS, DTYPES

FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]
LARGEST = {"none": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}

_SHAPES = st.one_of(st.lists(st.integers(0, 9), max_size=4), st.sampled_from([[63], [64], [65], [128], [3, 67]]))
_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.permute(tuple(reversed(range(x.dim())))),
    "strided": lambda x: x.reshape(-1)[::3],
    "offset": lambda x: x.reshape(-1)[1:],
    "expanded": lambda x: x.unsqueeze(0).expand(3, *x.shape),
}


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype], codec: str = "none") -> torch.Tensor:
    """A tensor of one of the dtypes whose values the codec may carry, the largest and smallest of them included."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(_SHAPES)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if dtype.is_floating_point:
        limit = min(torch.finfo(dtype).max, torch.finfo(LARGEST[codec]).max)
        low, high = sorted(draw(st.tuples(st.integers(-45, 39), st.integers(-45, 39))))
        exponents = low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)
        values = torch.randn(shape, generator=random, dtype=torch.float64) * 10**exponents
        tensor = values.clamp(-limit, limit).to(dtype)
        # 65504 as bfloat16 is 65536, which float16 cannot carry.
        tensor = torch.where(tensor.double().abs() > limit, 1, tensor)
    else:
        tensor = torch.randint(-128, 128, shape, generator=random).to(dtype)
    layout = _LAYOUTS[draw(st.sampled_from(sorted(_LAYOUTS)))]
    return layout(tensor)


@st.composite
def carried(draw: st.DrawFn) -> tuple[torch.Tensor, str]:
    """A tensor and a codec that may carry it."""
    codec = draw(st.sampled_from(CODECS))
    return draw(tensors(list(DTYPES.values()) if codec == "none" else FLOATS, codec)), codec


def bits(tensor: torch.Tensor) -> bytes:
    """The exact content of a tensor, signs of zeros included."""
    return bytes(tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist())
