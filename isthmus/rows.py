"""Rows without padding: which tokens of a batch are real, where each row starts, which outputs are wanted.

Knows masks, positions and how to pack and pad; knows no model and no transport beyond its own message.
Shapes: B rows, T tokens with padding, N real tokens of all rows laid end to end, D hidden size.
"""

from dataclasses import dataclass

import torch

from isthmus.errors import CutError, WireError
from isthmus.wire.gen import backbone_pb2 as pb

MAX_POSITION = 2**31


@dataclass(frozen=True)
class Rows:
    """The real tokens of a batch: `lengths` and first positions `starts` by row; `wanted_N` marks outputs to return."""

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    wanted_N: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Real tokens of all rows: N."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row: T of the padded batch."""
        return max(self.lengths)

    @property
    def returned(self) -> int:
        """Tokens whose output is wanted."""
        return self.tokens if self.wanted_N is None else int(self.wanted_N.sum())

    def apart(self) -> tuple[list[int], list[int]]:
        """Tokens of each row, and how many of its outputs are wanted."""
        lengths = list(self.lengths)
        if self.wanted_N is None:
            return lengths, lengths
        return lengths, [int(part.sum()) for part in torch.split(self.wanted_N, lengths)]

    def index(self, left: bool = False) -> torch.Tensor:
        """Where each real token stands in the flattened padded batch of B x `longest`: int64 [N].

        Args:
            left: pad on the left instead of the right.
        """
        width = self.longest
        places = [
            torch.arange(length) + row * width + (width - length if left else 0)
            for row, length in enumerate(self.lengths)
        ]
        return torch.cat(places)

    def positions(self, left: bool = False) -> torch.Tensor:
        """Position ids of the padded batch: int64 [B, T]; padding gets position 0."""
        flat = torch.zeros(len(self.lengths) * self.longest, dtype=torch.long)
        flat[self.index(left)] = torch.cat(
            [torch.arange(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True)]
        )
        return flat.view(len(self.lengths), self.longest)

    def mask(self, left: bool = False) -> torch.Tensor | None:
        """Attention mask of the padded batch: int64 [B, T], or None when nothing is padded."""
        if len(set(self.lengths)) == 1:
            return None
        flat = torch.zeros(len(self.lengths) * self.longest, dtype=torch.long)
        flat[self.index(left)] = 1
        return flat.view(len(self.lengths), self.longest)

    def to_wire(self) -> pb.Rows:
        """The message that says the same."""
        message = pb.Rows(row_lengths=self.lengths)
        if any(self.starts):
            message.starts.extend(self.starts)
        if self.wanted_N is not None:
            message.wanted = pack_bits(self.wanted_N)
        return message

    @classmethod
    def from_wire(cls, message: pb.Rows) -> "Rows":
        """Read a peer's rows.

        Raises:
            WireError: no rows, an empty row, or starts or bits that do not match the rows.
        """
        lengths = tuple(message.row_lengths)
        if not lengths or min(lengths) == 0:
            raise WireError("rows must be at least one, and each must hold at least one token")
        starts = tuple(message.starts) or (0,) * len(lengths)
        if len(starts) != len(lengths) or max(starts) + max(lengths) > MAX_POSITION:
            raise WireError(f"{len(starts)} start positions do not fit {len(lengths)} rows")
        wanted = unpack_bits(message.wanted, sum(lengths)) if message.wanted else None
        return cls(lengths, starts, wanted)


def rows_of_batch(
    shape: tuple[int, int],
    mask_BT: torch.Tensor | None,
    positions_BT: torch.Tensor | None,
    past: int = 0,
    wanted_BT: torch.Tensor | None = None,
) -> tuple[Rows, torch.Tensor | None]:
    """Read the rows of a padded batch.

    Args:
        shape: (B, T) of the tokens at hand.
        mask_BT: 1 where a token is real, over the past and the tokens at hand or over the latter only; None: all are.
        positions_BT: position ids [B or 1, T]; None: column numbers after the past.
        past: tokens that stand in a cache before the ones at hand.
        wanted_BT: bool, the outputs that are wanted; None: all.

    Returns:
        The rows, and the flat index [N] of their tokens in the padded batch; None when nothing is padded.

    Raises:
        CutError: a row is empty or has padding between its tokens, or its positions do not follow one another.
    """
    rows, tokens = shape
    positions_BT = torch.arange(past, past + tokens)[None] if positions_BT is None else positions_BT.cpu()
    real_BT = None if mask_BT is None else mask_BT[:, -tokens:].bool().cpu()
    if real_BT is None or bool(real_BT.all()):
        _require_consecutive(positions_BT)
        starts = tuple(positions_BT[:, 0].expand(rows).tolist())
        wanted = None if wanted_BT is None else wanted_BT.reshape(-1).cpu()
        return Rows((tokens,) * rows, starts, wanted), None
    lengths, first = real_BT.sum(1), real_BT.int().argmax(1)
    last = tokens - 1 - real_BT.flip(1).int().argmax(1)
    if int(lengths.min()) == 0 or not torch.equal(last - first + 1, lengths):
        raise CutError("a row is empty or has padding between its tokens; pad rows on one side only")
    positions_BT = positions_BT.expand(rows, tokens)
    _require_consecutive(positions_BT, real_BT[:, 1:] & real_BT[:, :-1])
    starts_B = positions_BT.gather(1, first[:, None])[:, 0]
    index = real_BT.reshape(-1).nonzero()[:, 0]
    wanted = None if wanted_BT is None else wanted_BT.reshape(-1).cpu()[index]
    return Rows(tuple(lengths.tolist()), tuple(starts_B.tolist()), wanted), index


def _require_consecutive(positions_BT: torch.Tensor, pairs: torch.Tensor | None = None) -> None:
    jumps = positions_BT[:, 1:] - positions_BT[:, :-1] != 1
    if bool((jumps if pairs is None else jumps & pairs).any()):
        raise CutError("position ids must follow one another within a row")


def pack(padded_BTD: torch.Tensor, index_N: torch.Tensor | None) -> torch.Tensor:
    """The tokens at `index_N` of a padded batch: [B, T, D] to [N, D]; differentiable."""
    flat = padded_BTD.reshape(-1, padded_BTD.shape[-1])
    return flat if index_N is None else flat.index_select(0, index_N.to(flat.device))


def pad(tokens_ND: torch.Tensor, index_N: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of `pack`: [N, D] to [B, T, D], zeros elsewhere; differentiable."""
    size = tokens_ND.shape[-1]
    if index_N is None:
        return tokens_ND.reshape(*shape, size)
    flat = tokens_ND.new_zeros(shape[0] * shape[1], size)
    return flat.index_copy(0, index_N.to(flat.device), tokens_ND).view(*shape, size)


def pack_bits(flags_N: torch.Tensor) -> bytes:
    """Booleans as a bitmap, least significant bit first."""
    padded = torch.zeros((len(flags_N) + 7) // 8 * 8, dtype=torch.uint8)
    padded[: len(flags_N)] = flags_N
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return bytes((padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8).tolist())


def unpack_bits(bitmap: bytes, count: int) -> torch.Tensor:
    """The inverse of `pack_bits`: bool [count].

    Raises:
        WireError: the bitmap has another length, or sets bits beyond `count`.
    """
    if len(bitmap) != (count + 7) // 8:
        raise WireError(f"a bitmap of {len(bitmap)} bytes does not fit {count} tokens")
    octets = torch.frombuffer(bytearray(bitmap), dtype=torch.uint8)
    bits = ((octets[:, None] >> torch.arange(8)) & 1).bool().view(-1)
    if bool(bits[count:].any()):
        raise WireError(f"a bitmap marks tokens beyond the {count} that were sent")
    return bits[:count]
