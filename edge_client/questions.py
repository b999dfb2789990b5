"""What the rows of a file ask a model: to go on, to answer, or to choose.

Knows JSON Lines and tokenizers; knows no model to ask.

    {"prompt"}                         how does it go on?
    {"messages": [...]}                what is answered to the last user's turn?
    {"prompt", "choices"}              which choice is the likeliest?
    {"text"}                           how does it go on? Of a classifier: which label is the likeliest?

Other keys, such as an id or what training needs beside these, are nobody's business here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from isthmus.errors import DataError
from isthmus.training.data import Encoder, Label, TokenSequence, turns_of
from isthmus.training.lines import lines_of

SHAPES = '{"prompt"}, {"messages"}, {"prompt", "choices"} or {"text"}'
ADDED = ("prediction", "probabilities")
"""Keys of an answer."""

_ANSWER = {"role": "assistant", "content": "..."}


@dataclass(frozen=True)
class Row:
    """One row: the file's name and its line, the line as it stands there, and what it holds."""

    place: str
    line: str
    values: dict[str, Any]


@dataclass(frozen=True)
class GoOn:
    """What comes after these tokens?"""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Choose:
    """Which of these texts or labels is the likeliest? Their sequences are alike up to their first target.

    `place`: of the row that asks, as `FILE:LINE`.
    """

    place: str
    choices: tuple[Label, ...]
    sequences: tuple[TokenSequence, ...]


Question = GoOn | Choose


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; blank lines are skipped.

    Raises:
        DataError: the file cannot be read, holds no rows, or a line is no JSON object.
    """
    return [Row(f"{path}:{number}", line.decode().strip(), values) for number, line, values in lines_of(path, SHAPES)]


class Questions:
    """Turns rows into questions and counts those that it shortens.

    Rows lose the beginning of what they say, a classifier's rows what its tokenizer cuts off: the end, mostly.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        row_tokens: int,
        labels: Sequence[Label] | None = None,
    ) -> None:
        """Keep `prompt_tokens` tokens where text is to follow, and `row_tokens` of a prompt with its choice.

        `labels`: a classifier's, which is asked nothing else.
        """
        self._asking = Encoder(tokenizer, prompt_tokens)
        self._choosing = Encoder(tokenizer, row_tokens, labels)
        self._labels = labels

    @property
    def shortened(self) -> int:
        """Rows that lost tokens."""
        return self._asking.truncated + self._choosing.truncated

    def of(self, row: Row) -> Question:
        """What a row asks.

        Raises:
            DataError: it has none of the shapes, or an answer already; the message is `FILE:LINE: what; what to do`.
        """
        try:
            return self._of(row)
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error

    def _of(self, row: Row) -> Question:
        values = row.values
        for key in ADDED:
            if key in values:
                raise DataError(f"has the key {key!r} already; rename it, or take the rows without answers")
        if self._labels is not None:
            if "text" not in values:
                raise DataError(
                    'has no "text", which is all that a classifier reads; write {"text"}, with any other keys'
                )
            return self._labelled(row.place, self._labels, values["text"])
        match sorted(values.keys() & {"prompt", "messages", "text", "choices"}):
            case ["prompt"]:
                return self.after(values["prompt"], "prompt")
            case ["text"]:
                return self.after(values["text"], "text")
            case ["messages"]:
                return self.answering(values["messages"])
            case ["choices", "prompt"]:
                return self._among(row)
            case found:
                shapes = ", ".join(map(repr, found)) or "no key that asks anything"
                raise DataError(f"has {shapes}, which is no shape; accepted are {SHAPES}, with any other keys")

    def after(self, text: object, name: str) -> GoOn:
        """How does a text go on?

        Raises:
            DataError: it is none; the message calls it `name`.
        """
        return self._kept(self._asking.opening + self._asking.ids_of(text, f'"{name}"'))

    def answering(self, messages: object) -> GoOn:
        """What is answered to the last user's turn? An answer that is there already is not looked at.

        Raises:
            DataError: it is no conversation, or no user has the last word, or the chat template refuses it.
        """
        turns = turns_of([*messages, _ANSWER] if isinstance(messages, list) and messages else messages)[:-1]
        asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        if asked[-1]["role"] != "user":
            raise DataError('"messages" has no user\'s turn at its end to answer; end it in one')
        return self._kept(self._asking.tokens_of(self._asking.render(asked, prompt=True)))

    def _labelled(self, place: str, labels: Sequence[Label], text: object) -> Choose:
        first = self._choosing.labelled(text, 0)
        sequences = (replace(first, ids=(*first.ids[:-1], number)) for number in range(len(labels)))
        return Choose(place, tuple(labels), tuple(sequences))

    def _among(self, row: Row) -> Choose:
        choices = row.values["choices"]
        example = self._choosing.from_choices(row.values["prompt"], choices, 0)
        return Choose(row.place, tuple(choices), example.choices)

    def _kept(self, ids: list[int]) -> GoOn:
        (sequence,) = self._asking.fit(ids, [False] * len(ids), [[]])
        return GoOn(sequence.ids)
