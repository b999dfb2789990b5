"""A tensor arrives as it was sent, and a header that lies is refused before anything is allocated for it."""

import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from isthmus.errors import WireError
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import check, pack, unpack
from tests.wire.drawn import carried

LIMIT = 1 << 20


def header(**changed: Any) -> pb.Tensor:
    """An honest header of a [4, 8] float32 tensor, but for what is changed."""
    honest = pb.Tensor(dtype="float32", shape=[4, 8], codec="none", size=128)
    for field in changed:
        honest.ClearField(field)
    honest.MergeFrom(pb.Tensor(**changed))
    return honest


@settings(max_examples=100, deadline=None)
@given(carried())
def test_a_packed_tensor_survives_serialisation_of_its_header(case: tuple[torch.Tensor, str]) -> None:
    tensor, codec = case
    sent, payload = pack(tensor, codec)
    received = pb.Tensor.FromString(sent.SerializeToString())
    back = unpack(received, bytearray(payload), LIMIT)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    if codec == "none":
        assert torch.equal(back, tensor)


def test_an_honest_header_passes() -> None:
    assert check(header(), LIMIT) == (torch.float32, (4, 8))


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        ({"dtype": "complex64"}, "no dtype"),
        ({"dtype": "torch.float32"}, "no dtype"),
        ({"dtype": "x" * 10_000}, "no dtype"),
        ({"codec": "gzip"}, "no codec"),
        ({"codec": ""}, "no codec"),
        ({"codec": "int8", "dtype": "int64"}, "use none"),
        ({"codec": "bf16", "dtype": "bool"}, "use none"),
        ({"shape": [1] * 9}, "9 dimensions"),
        ({"shape": [1] * 100_000}, "100000 dimensions"),
        ({"shape": [2**63]}, "absurd"),
        ({"shape": [2**63, 2], "size": 0}, "absurd"),
        ({"shape": [2**32, 2**32], "size": 0}, "absurd"),
        ({"shape": [2**39, 2**39, 0], "size": 0}, "absurd"),
        ({"shape": [2**64 - 1] * 8, "size": 8}, "absurd"),
        ({"size": 127}, "declares 127 bytes"),
        ({"size": 129}, "declares 129 bytes"),
        ({"size": 2**64 - 1}, "declares"),
        ({"codec": "int8"}, "declares 128 bytes"),
        ({"shape": [2**38], "size": 2**40}, "bytes allowed"),
        ({"shape": [2**18, 2], "size": 2**21}, "bytes allowed"),
        ({"shape": [2**18], "dtype": "float64", "codec": "bf16", "size": 2**19}, "bytes allowed"),
    ],
)
def test_a_header_that_lies_is_refused_in_one_short_line_and_nothing_is_allocated(
    lie: dict[str, object], says: str
) -> None:
    lying = header(**lie)
    tracemalloc.start()
    with pytest.raises(WireError, match=says) as refusal:
        unpack(lying, b"", LIMIT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < LIMIT
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 250


def test_the_limit_itself_is_allowed() -> None:
    assert check(header(shape=[2**18], size=2**20), LIMIT)[1] == (2**18,)


@pytest.mark.parametrize("codec", ["none", "bf16", "fp16", "int8"])
def test_one_flipped_bit_anywhere_is_noticed(codec: str) -> None:
    sent, payload = pack(torch.randn(70, generator=torch.Generator().manual_seed(0)), codec)
    for position in range(0, len(payload), 7):
        damaged = bytearray(payload)
        damaged[position] ^= 1
        with pytest.raises(WireError, match="checksum"):
            unpack(sent, damaged, LIMIT)


@pytest.mark.parametrize("cut", [slice(0, -1), slice(0, 0), slice(1, None)])
def test_a_payload_of_another_size_is_refused(cut: slice) -> None:
    sent, payload = pack(torch.ones(4), "none")
    with pytest.raises(WireError, match="16 were declared"):
        unpack(sent, payload[cut], LIMIT)


def test_a_value_that_is_not_finite_is_refused_though_its_checksum_is_right() -> None:
    sent, payload = pack(torch.tensor([0x7FC00000], dtype=torch.int32), "none")
    sent.dtype = "float32"
    with pytest.raises(WireError, match="not finite"):
        unpack(sent, payload, LIMIT)
