"""What each codec promises: exact sizes, bounded error, and refusal of what it cannot carry."""

import math

import pytest
import torch
from hypothesis import given, settings

from isthmus.errors import CodecError, WireError
from isthmus.wire.codecs import BLOCK, CODECS, DTYPES, decode, encode, encoded_size
from tests.wire.drawn import FLOATS, LARGEST, bits, carried, tensors

LOSSY = CODECS[1:]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
modest = settings(max_examples=120, deadline=None)


def round_trip(tensor: torch.Tensor, codec: str) -> torch.Tensor:
    return decode(bytearray(encode(tensor, codec)), codec, tensor.dtype, tensor.shape)


def blocks(tensor: torch.Tensor) -> list[torch.Tensor]:
    flat = tensor.reshape(-1)
    return [flat[start : start + BLOCK] for start in range(0, flat.numel(), BLOCK)]


def bound(tensor: torch.Tensor, codec: str) -> torch.Tensor:
    """The largest error allowed, float64, of the tensor's shape; computed from the documentation, not the code."""
    exact = tensor.double()
    rounding = exact.abs() * max(torch.finfo(tensor.dtype).eps, 2**-23) + torch.finfo(tensor.dtype).smallest_normal / 4
    if codec == "bf16":
        return exact.abs() * 2**-8 + 2**-134 + rounding
    if codec == "fp16":
        return exact.abs() * 2**-11 + 2**-25 + rounding
    scales = [max(block.abs().max().item() / 127 * (1 + 2**-7), 2**-126) for block in blocks(exact)]
    per_value = torch.tensor(scales, dtype=torch.float64).repeat_interleave(BLOCK)[: exact.numel()]
    return per_value.reshape(exact.shape) / 2 + rounding


@modest
@given(carried())
def test_a_round_trip_keeps_dtype_and_shape_and_takes_exactly_the_declared_bytes(
    case: tuple[torch.Tensor, str],
) -> None:
    tensor, codec = case
    payload = encode(tensor, codec)
    assert payload.nbytes == len(payload) == encoded_size(codec, tensor.dtype, tensor.shape)
    back = decode(payload, codec, tensor.dtype, tensor.shape)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)


@modest
@given(tensors(list(DTYPES.values())))
def test_none_is_bit_exact(tensor: torch.Tensor) -> None:
    assert bits(round_trip(tensor, "none")) == bits(tensor)


@pytest.mark.parametrize("codec", LOSSY)
def test_a_lossy_codec_stays_within_its_bound(codec: str) -> None:
    @modest
    @given(tensors(FLOATS, codec))
    def holds(tensor: torch.Tensor) -> None:
        if tensor.numel():
            error = (round_trip(tensor, codec).double() - tensor.double()).abs()
            assert (error <= bound(tensor, codec)).all()

    holds()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", CODECS)
def test_the_device_does_not_change_the_bytes(codec: str, device: str) -> None:
    tensor = torch.randn(33, 7, generator=torch.Generator().manual_seed(0))
    assert encode(tensor.to(device), codec) == encode(tensor, codec)


@pytest.mark.parametrize(("codec", "carrier"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_float_codec_really_rounds_to_its_type_and_is_lossless_on_it(codec: str, carrier: torch.dtype) -> None:
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert len(encode(tensor, codec)) == tensor.nbytes / 2
    assert torch.equal(round_trip(tensor, codec), tensor.to(carrier).float())
    assert not torch.equal(round_trip(tensor, codec), tensor)
    assert bits(round_trip(tensor.to(carrier), codec)) == bits(tensor.to(carrier))


def test_int8_lays_out_all_values_then_all_scales() -> None:
    tensor = torch.tensor([127.0, -127.0, 0.0, 64.4] + [0.0] * 60 + [254.0])
    values = bytes([127, 129, 0, 64]) + bytes(60) + bytes([127])
    assert bytes(encode(tensor, "int8")) == values + b"\x80\x3f" + b"\x00\x40"


def test_int8_keeps_at_most_255_levels_a_block_in_about_a_quarter_of_the_bytes() -> None:
    tensor = torch.randn(64 * BLOCK, generator=torch.Generator().manual_seed(0))
    assert len(encode(tensor, "int8")) == tensor.nbytes / 4 * (1 + 2 / BLOCK)
    scale = decode(encode(tensor, "int8")[-2:], "none", torch.bfloat16, (1,)).float()
    levels = round_trip(tensor, "int8")[-BLOCK:] / scale
    assert torch.equal(levels, levels.round())
    assert 100 < levels.abs().max() <= 127


@modest
@given(tensors(FLOATS, "int8"))
def test_int8_scales_are_rounded_up_so_that_no_value_passes_127(tensor: torch.Tensor) -> None:
    payload, elements = encode(tensor, "int8"), tensor.numel()
    count = -(-elements // BLOCK)
    scales = decode(payload[elements:], "none", torch.bfloat16, (count,)).double()
    for scale, block in zip(scales, blocks(tensor.double()), strict=True):
        assert block.abs().max() <= 127 * scale * (1 + 2**-23)
    assert -128 not in decode(payload[:elements], "none", torch.int8, (elements,))


def test_int8_decodes_a_zero_block_to_exactly_zero() -> None:
    tensor = torch.cat([torch.zeros(BLOCK), torch.ones(3)])
    assert torch.equal(round_trip(tensor, "int8")[:BLOCK], torch.zeros(BLOCK))


@pytest.mark.parametrize("size", [1e-8, 1e-20, 1e-35])
def test_int8_does_not_lose_small_gradients(size: float) -> None:
    tensor = torch.linspace(-size, size, BLOCK)
    assert torch.allclose(round_trip(tensor, "int8"), tensor, rtol=0, atol=size / 200)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_codec_sends_a_value_that_is_not_finite(codec: str, dtype: torch.dtype, bad: float) -> None:
    for position in (0, 37, 199):
        tensor = torch.ones(200, dtype=dtype)
        tensor[position] = bad
        with pytest.raises(CodecError, match="not finite"):
            encode(tensor, codec)


@pytest.mark.parametrize(("codec", "carrier"), [("none", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_codec_receives_a_value_that_is_not_finite(codec: str, carrier: torch.dtype | None, bad: float) -> None:
    payload = bytearray(torch.tensor([1.0, bad]).to(carrier or torch.float32).view(torch.uint8).tolist())
    with pytest.raises(WireError, match="not finite"):
        decode(payload, codec, torch.float32, (2,))


@pytest.mark.parametrize("payload", [b"\x00\x80\x7f", b"\x01\x80\xff", b"\x01\xc0\x7f", b"\x7f\x7f\x7f"])
def test_int8_refuses_a_scale_that_is_not_finite_or_makes_a_value_that_is_not(payload: bytes) -> None:
    with pytest.raises(WireError, match="not finite"):
        decode(payload, "int8", torch.float32, (1,))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_ends_of_the_range_come_back_finite_and_within_the_bound(codec: str, dtype: torch.dtype) -> None:
    limit = min(torch.finfo(dtype).max, torch.finfo(LARGEST[codec]).max)
    tensor = torch.tensor(limit, dtype=dtype)
    if tensor.double() > limit:
        tensor = torch.nextafter(tensor, torch.zeros_like(tensor))
    ends = torch.stack([tensor, -tensor])
    assert ((round_trip(ends, codec).double() - ends.double()).abs() <= bound(ends, codec)).all()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if not dtype.is_floating_point])
def test_a_lossy_codec_refuses_whole_numbers(codec: str, dtype: torch.dtype) -> None:
    with pytest.raises(CodecError, match="use none"):
        encode(torch.zeros(3, dtype=dtype), codec)


@pytest.mark.parametrize(
    ("value", "dtype", "codec", "advice"),
    [
        (65505.0, torch.float32, "fp16", "use bf16 or int8"),
        (-1e30, torch.bfloat16, "fp16", "use bf16 or int8"),
        (3.4e38, torch.float32, "bf16", "use none"),
        (1e300, torch.float64, "int8", "use none"),
    ],
)
def test_a_value_beyond_the_codec_is_refused_with_advice(
    value: float, dtype: torch.dtype, codec: str, advice: str
) -> None:
    with pytest.raises(CodecError, match=advice):
        encode(torch.tensor([0.0, value], dtype=dtype), codec)


@pytest.mark.parametrize(("dtype", "codec"), [(torch.complex64, "none"), (torch.float32, "zip")])
def test_what_does_not_travel_is_refused(dtype: torch.dtype, codec: str) -> None:
    with pytest.raises(CodecError, match="use one of"):
        encode(torch.zeros(1, dtype=dtype), codec)


def test_a_bool_that_is_neither_0_nor_1_is_refused() -> None:
    with pytest.raises(WireError, match="neither 0 nor 1"):
        decode(b"\x00\x02", "none", torch.bool, (2,))


def test_a_payload_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(WireError, match="3 bytes where 4 were declared"):
        decode(b"abc", "none", torch.float32, ())


def test_sizes_of_absurd_shapes_do_not_overflow() -> None:
    assert encoded_size("none", torch.float64, (2**63, 2**63)) == 2**129


def test_none_copies_nothing_on_the_way_out_and_only_a_bytearray_is_aliased_on_the_way_in() -> None:
    tensor = torch.arange(4.0)
    payload = encode(tensor, "none")
    tensor[0] = 7
    assert bytes(payload[:4]) == bytes(torch.tensor([7.0]).view(torch.uint8).tolist())
    decode(payload, "none", torch.float32, (4,))[0] = 9
    assert tensor[0] == 7
    received = bytearray(payload)
    decode(received, "none", torch.float32, (4,)).zero_()
    assert received == bytes(16)


def test_an_unaligned_payload_decodes_to_an_aligned_tensor() -> None:
    payload = memoryview(bytearray(b"x" + bytes(encode(torch.arange(5.0), "none"))))[1:]
    decoded = decode(payload, "none", torch.float32, (5,))
    assert torch.equal(decoded, torch.arange(5.0))
    assert decoded.data_ptr() % 4 == 0
