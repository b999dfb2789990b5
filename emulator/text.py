"""The owner's public text: read, cut into rows, split into what an emulator is made with and what it is measured on.

Knows files and tokenizers; knows no model and no tensors. The same file and tokenizer give the same rows and split.
"""

import codecs
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from isthmus.errors import DataError, UsageError
from isthmus.load import load_tokenizer
from isthmus.report.verdict import FEWEST_ROWS
from isthmus.training.data import TokenSequence, read_examples

HELD_OUT = 64
"""Rows at most that nothing is made with."""

SHARE = 10
"""Of so many rows one is held out."""

CALIBRATION = 256
"""Rows at most that inputs of linear modules are taken from."""


@dataclass(frozen=True)
class PublicText:
    """A file's rows.

    Attributes:
        digest: SHA-256 of the file, in hex.
        rows: for making an emulator.
        held_out: the file's last rows, for measuring it: a tenth, at least one and at most `HELD_OUT`.
    """

    digest: str
    rows: tuple[TokenSequence, ...]
    held_out: tuple[TokenSequence, ...]

    def without(self, held_out: Sequence[TokenSequence]) -> "PublicText":
        """The same text, but none of `rows` has the tokens of a held-out one, of this file or of another.

        Raises:
            DataError: fewer rows are left to make an emulator with than are held out.
        """
        measured = {row.ids for row in held_out}
        kept = tuple(row for row in self.rows if row.ids not in measured)
        if len(kept) < min(len(held_out), len(self.rows)):
            raise DataError(
                f"{len(self.rows) - len(kept)} of {len(self.rows)} rows of public text are also among the "
                f"{len(held_out)} that are held out, and the other {len(kept)} are too few to make an emulator with; "
                "give more text, or text that repeats itself less"
            )
        return replace(self, rows=kept)

    @property
    def calibration(self) -> list[TokenSequence]:
        """`CALIBRATION` of the rows, spread evenly; all of them if they are fewer."""
        count = min(CALIBRATION, len(self.rows))
        return [self.rows[place * len(self.rows) // count] for place in range(count)]


def enough(max_length: int) -> str:
    """How much text it takes that enough is held out for an interval, in words; rows have `max_length` tokens."""
    return (
        f"{FEWEST_ROWS * SHARE} rows of text (a .jsonl has one a line, a .txt is cut into rows of {max_length} tokens)"
    )


def read_text(path: Path, model: Path, max_length: int) -> PublicText:
    """Read `.jsonl`, row by row as for training, or `.txt`, cut into rows of at most `max_length` tokens.

    Args:
        path: the file.
        model: the folder that the tokenizer is in.
        max_length: tokens of a row.

    Raises:
        UsageError: the name ends otherwise, `max_length` is below 2, or no tokenizer can be read.
        DataError: the file cannot be read, is malformed, or gives a single row; the message names it.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise UsageError(f"{path} is neither .jsonl nor .txt; name public text in one of these two forms")
    if max_length < 2:
        raise UsageError(f"the maximum length must be at least 2 tokens, not {max_length}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    tokenizer = load_tokenizer(model)
    if path.suffix == ".jsonl":
        rows: Sequence[TokenSequence] = [row.train for row in read_examples(path, tokenizer, max_length).examples]
    else:
        rows = _cut(_decoded(path, content), tokenizer, max_length)
    if len(rows) < 2:
        raise DataError(f"{path}: gives {len(rows)} rows, and one is held out to measure on; give more text")
    bound = len(rows) - max(1, min(HELD_OUT, len(rows) // SHARE))
    return PublicText(hashlib.sha256(content).hexdigest(), tuple(rows[:bound]), tuple(rows[bound:]))


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: is not UTF-8; convert the file, for example with iconv") from None


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[TokenSequence]:
    """Rows of a running text, each after the token that the tokenizer begins a text with, if it has one."""
    bare = list(tokenizer("")["input_ids"])
    opening = bare[:1] if bare[:1] == [tokenizer.bos_token_id] else []
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    width = max_length - len(opening)
    pieces = (tuple(opening + ids[start : start + width]) for start in range(0, len(ids), width))
    return [TokenSequence(piece, (False,) + (True,) * (len(piece) - 1)) for piece in pieces if len(piece) > 1]
