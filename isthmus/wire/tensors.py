"""A tensor as a header that declares it and a payload that carries it.

Knows headers, limits and checksums. It refuses to know how values become bytes (codecs) and how bytes travel (chunks).
A header is a claim by a peer: `check` judges it before a byte is allocated for it.
"""

import math
from collections.abc import Sequence

import torch
import xxhash

from isthmus.errors import WireError
from isthmus.wire.codecs import CODECS, DTYPES, decode, encode, encoded_size
from isthmus.wire.gen import backbone_pb2 as pb

MAX_RANK = 8
MAX_ELEMENTS = 1 << 40

Encoded = tuple[pb.Tensor, memoryview]
"""A tensor as it crosses: its header and its payload."""


def pack(tensor: torch.Tensor, codec: str) -> Encoded:
    """Header and payload of a tensor.

    The payload may alias the tensor, which must then not change until it is sent (see `codecs.encode`).

    Raises:
        CodecError: the codec cannot carry this tensor.
    """
    payload = encode(tensor, codec)
    return header_of(tensor.dtype, tensor.shape, codec, xxhash.xxh3_64_intdigest(payload)), payload


def header_of(dtype: torch.dtype, shape: Sequence[int], codec: str, checksum: int) -> pb.Tensor:
    """The header that declares a tensor.

    Raises:
        CodecError: the codec cannot carry such a tensor.
    """
    return pb.Tensor(
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        codec=codec,
        size=encoded_size(codec, dtype, shape),
        checksum=checksum,
    )


def check(header: pb.Tensor, max_bytes: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype and shape that a header declares, once everything it claims is found possible and within `max_bytes`.

    The limit holds for the encoded size and for the decoded size, each by itself.

    Raises:
        WireError: the header claims an unknown dtype or codec, an absurd shape, a wrong size or too many bytes.
    """
    dtype = DTYPES.get(header.dtype)
    if dtype is None:
        raise WireError(f"no dtype {header.dtype!r:.40}; use one of {', '.join(DTYPES)}")
    if header.codec not in CODECS:
        raise WireError(f"no codec {header.codec!r:.40}; use one of {', '.join(CODECS)}")
    if header.codec != "none" and not dtype.is_floating_point:
        raise WireError(f"codec {header.codec} does not carry {header.dtype}; use none")
    shape = _shape(header)
    size = encoded_size(header.codec, dtype, shape)
    if header.size != size:
        raise WireError(f"header declares {header.size} bytes where {header.codec} {header.dtype} takes {size}")
    if max(size, decoded_size(header)) > max_bytes:
        raise WireError(f"tensor needs more than the {max_bytes} bytes allowed; send smaller batches")
    return dtype, shape


def unpack(header: pb.Tensor, payload: memoryview | bytes | bytearray, max_bytes: int) -> torch.Tensor:
    """The CPU tensor that a peer sent, checked in every respect.

    It may alias a bytearray that was given as payload (see `codecs.decode`).

    Raises:
        WireError: the header fails `check`, or the payload has the wrong size, checksum or a value that is not finite.
    """
    dtype, shape = check(header, max_bytes)
    if memoryview(payload).nbytes == header.size and xxhash.xxh3_64_intdigest(payload) != header.checksum:
        raise WireError("payload does not match its checksum; send the tensor again")
    return decode(payload, header.codec, dtype, shape)


def decoded_size(header: pb.Tensor) -> int:
    """Bytes of the tensor that a header with a known dtype declares."""
    return math.prod(header.shape) * DTYPES[header.dtype].itemsize


def _shape(header: pb.Tensor) -> tuple[int, ...]:
    if len(header.shape) > MAX_RANK:
        raise WireError(f"tensor has {len(header.shape)} dimensions; {MAX_RANK} are allowed")
    # A zero hides no absurd neighbour: strides are computed from the others.
    if math.prod(max(dim, 1) for dim in header.shape) >= MAX_ELEMENTS:
        raise WireError(f"shape {list(header.shape)} is absurd; fewer than 2**40 elements are allowed")
    return tuple(header.shape)
