"""Ragged rows: what is packed comes back in its place, whatever the lengths and the side of the padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import CutError, WireError
from isthmus.rows import MAX_POSITION, Rows, pack, pack_bits, pad, rows_of_batch, unpack_bits
from isthmus.wire.gen import backbone_pb2 as pb

SIZE = 3
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@st.composite
def ragged(draw: st.DrawFn) -> Rows:
    """Rows of any lengths and starts, with all, some or none of their outputs wanted."""
    lengths = tuple(draw(LENGTHS))
    starts = tuple(draw(st.lists(st.integers(0, 99), min_size=len(lengths), max_size=len(lengths))))
    total = sum(lengths)
    wanted = draw(st.none() | st.lists(st.booleans(), min_size=total, max_size=total))
    return Rows(lengths, starts, None if wanted is None else torch.tensor(wanted))


def mask_of(lengths: tuple[int, ...], left: bool, extra: int = 0) -> torch.Tensor:
    """A mask [B, T] said plainly, row by row."""
    width = max(lengths) + extra
    rows = [[0] * (width - length) + [1] * length for length in lengths]
    return torch.tensor(rows if left else [row[::-1] for row in rows])


def equal(ours: Rows, theirs: Rows) -> bool:
    wanted = (
        theirs.wanted_N is None
        if ours.wanted_N is None
        else theirs.wanted_N is not None and torch.equal(ours.wanted_N, theirs.wanted_N)
    )
    return ours.lengths == theirs.lengths and ours.starts == theirs.starts and wanted


@given(ragged(), st.booleans())
def test_tokens_come_back_to_their_places_and_padding_is_zero(rows: Rows, left: bool) -> None:
    tokens_ND = torch.randn(rows.tokens, SIZE)
    shape = (len(rows.lengths), rows.longest)
    padded_BTD = pad(tokens_ND, rows.index(left), shape)
    assert padded_BTD.shape == (*shape, SIZE)
    assert torch.equal(pack(padded_BTD, rows.index(left)), tokens_ND)
    real_BT = mask_of(rows.lengths, left).bool()
    assert torch.equal(padded_BTD[real_BT], tokens_ND)
    assert not padded_BTD[~real_BT].any()


@given(ragged(), st.booleans())
def test_the_gradient_of_packing_is_padding_and_the_reverse(rows: Rows, left: bool) -> None:
    index, shape = rows.index(left), (len(rows.lengths), rows.longest)
    padded_BTD, tokens_ND = torch.randn(*shape, SIZE, requires_grad=True), torch.randn(rows.tokens, SIZE)
    (gradient,) = torch.autograd.grad(pack(padded_BTD, index), padded_BTD, tokens_ND)
    assert torch.equal(gradient, pad(tokens_ND, index, shape))
    tokens_ND.requires_grad_()
    (gradient,) = torch.autograd.grad(pad(tokens_ND, index, shape), tokens_ND, padded_BTD)
    assert torch.equal(gradient, pack(padded_BTD, index))


@given(LENGTHS, st.integers(1, 9))
def test_without_padding_packing_only_lays_rows_end_to_end(lengths: list[int], width: int) -> None:
    rows = Rows((width,) * len(lengths), (0,) * len(lengths))
    padded_BTD = torch.randn(len(lengths), width, SIZE)
    assert rows.mask() is None
    assert torch.equal(pack(padded_BTD, None), padded_BTD.reshape(-1, SIZE))
    assert torch.equal(pad(pack(padded_BTD, None), None, (len(lengths), width)), padded_BTD)


@given(ragged(), st.booleans())
def test_mask_and_positions_say_where_each_row_is_and_begins(rows: Rows, left: bool) -> None:
    mask_BT, positions_BT = rows.mask(left), rows.positions(left)
    assert (mask_BT is None) == (len(set(rows.lengths)) == 1)
    real_BT = mask_of(rows.lengths, left).bool()
    if mask_BT is not None:
        assert torch.equal(mask_BT.bool(), real_BT)
    for row, (length, start) in enumerate(zip(rows.lengths, rows.starts, strict=True)):
        assert positions_BT[row][real_BT[row]].tolist() == list(range(start, start + length))
    assert not positions_BT[~real_BT].any()


@given(ragged(), st.booleans(), st.integers(0, 3), st.integers(0, 4))
def test_a_padded_batch_is_read_as_the_rows_it_was_made_of(rows: Rows, left: bool, extra: int, past: int) -> None:
    real_BT = mask_of(rows.lengths, left, extra).bool()
    count, width = real_BT.shape
    positions_BT, wanted_BT = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width, dtype=torch.bool)
    positions_BT[real_BT] = torch.cat(
        [torch.arange(start, start + length) for start, length in zip(rows.starts, rows.lengths, strict=True)]
    )
    if rows.wanted_N is not None:
        wanted_BT[real_BT] = rows.wanted_N
    mask_BT = torch.cat([torch.ones(count, past, dtype=torch.long), real_BT.long()], 1)
    found, index = rows_of_batch(
        (count, width), mask_BT, positions_BT, past, None if rows.wanted_N is None else wanted_BT
    )
    assert equal(found, rows)
    assert (index is None) == bool(real_BT.all())
    padded_BTD = torch.randn(count, width, SIZE)
    assert torch.equal(pack(padded_BTD, index), padded_BTD[real_BT])


@given(LENGTHS, st.booleans(), st.integers(0, 5))
def test_without_position_ids_a_row_begins_at_its_column_after_the_past(
    lengths: list[int], left: bool, past: int
) -> None:
    mask_BT = mask_of(tuple(lengths), left)
    found, _ = rows_of_batch((mask_BT.shape[0], mask_BT.shape[1]), mask_BT, None, past)
    first = [mask_BT.shape[1] - length if left else 0 for length in lengths]
    assert found.starts == tuple(past + column for column in first)


@given(ragged())
def test_rows_come_back_from_the_wire(rows: Rows) -> None:
    message = pb.Rows.FromString(rows.to_wire().SerializeToString())
    assert equal(Rows.from_wire(message), rows)
    assert bool(message.starts) == any(rows.starts), "starts of zero need no bytes"
    expected = rows.tokens if rows.wanted_N is None else int(rows.wanted_N.sum())
    assert Rows.from_wire(message).returned == expected


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_a_bitmap_comes_back_and_takes_a_bit_for_each_token(flags: list[bool]) -> None:
    bitmap = pack_bits(torch.tensor(flags))
    assert len(bitmap) == (len(flags) + 7) // 8
    assert unpack_bits(bitmap, len(flags)).tolist() == flags
    assert [bool(bitmap[at // 8] >> at % 8 & 1) for at in range(len(flags))] == flags


@given(st.lists(st.booleans(), min_size=1, max_size=70), st.data())
def test_a_bitmap_of_another_length_or_with_bits_beyond_its_tokens_is_refused(
    flags: list[bool], data: st.DataObject
) -> None:
    bitmap, count = pack_bits(torch.tensor(flags)), len(flags)
    for wrong in (bitmap + b"\0", bitmap[:-1]):
        with pytest.raises(WireError, match="does not fit"):
            unpack_bits(wrong, count)
    if count % 8:
        beyond = data.draw(st.integers(count % 8, 7))
        with pytest.raises(WireError, match="beyond"):
            unpack_bits(bitmap[:-1] + bytes([bitmap[-1] | 1 << beyond]), count)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (pb.Rows(), "at least one"),
        (pb.Rows(row_lengths=[3, 0]), "at least one token"),
        (pb.Rows(row_lengths=[3, 2], starts=[1]), "do not fit"),
        (pb.Rows(row_lengths=[3], starts=[1, 1]), "do not fit"),
        (pb.Rows(row_lengths=[3], starts=[MAX_POSITION - 1]), "do not fit"),
        (pb.Rows(row_lengths=[2**32 - 1]), "do not fit"),
        (pb.Rows(row_lengths=[3], wanted=b"\7\0"), "does not fit"),
        (pb.Rows(row_lengths=[3], wanted=b"\x0f"), "beyond"),
    ],
)
def test_rows_that_no_client_makes_are_refused(message: pb.Rows, why: str) -> None:
    with pytest.raises(WireError, match=why):
        Rows.from_wire(message)


@given(LENGTHS, st.booleans(), st.data())
def test_a_hole_between_a_rows_tokens_is_refused(lengths: list[int], left: bool, data: st.DataObject) -> None:
    long = data.draw(st.integers(3, 9))
    mask_BT = mask_of((*lengths, long), left)
    first = int(mask_BT[-1].argmax())
    mask_BT[-1, first + data.draw(st.integers(1, long - 2))] = 0
    with pytest.raises(CutError, match="padding between its tokens"):
        rows_of_batch((mask_BT.shape[0], mask_BT.shape[1]), mask_BT, None)


@given(LENGTHS, st.booleans(), st.booleans(), st.data())
def test_positions_that_jump_within_a_row_are_refused_and_those_of_padding_are_not_looked_at(
    lengths: list[int], left: bool, masked: bool, data: st.DataObject
) -> None:
    long = data.draw(st.integers(2, 9))
    mask_BT = mask_of((*lengths, long), left) if masked else torch.ones(len(lengths) + 1, long, dtype=torch.long)
    shape = (mask_BT.shape[0], mask_BT.shape[1])
    positions_BT = torch.where(mask_BT.bool(), mask_BT.cumsum(1) - 1, 77)
    rows_of_batch(shape, mask_BT, positions_BT)
    first = int(mask_BT[-1].argmax())
    positions_BT[-1, first + data.draw(st.integers(0, long - 1))] += data.draw(st.sampled_from([-1, 1, 5]))
    with pytest.raises(CutError, match="follow one another"):
        rows_of_batch(shape, mask_BT if masked else None, positions_BT)


def test_an_empty_row_is_refused() -> None:
    with pytest.raises(CutError, match="a row is empty"):
        rows_of_batch((2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), None)
