"""Rows to token sequences: what a row may look like, which of its tokens are learnt, what is refused.

Knows tokenizers; nothing of models, tensors or batches. A label is what a classifier predicts behind the last token, as
a token is what a language model does: a row with a label is a sequence that ends in the label's number.

    {"text"}                          every token but the first is a target, the end of sequence included
    {"prompt", "completion"}          the completion and the end of sequence are targets
    {"messages": [{"role", "content"}, ...]}   by the chat template; every assistant turn is a target
    {"prompt", "choices", "answer"}   scoring compares the choices; training takes the right one
    {"text", "label"}                 the label is the target
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from isthmus.classifier import FEWEST_LABELS, MOST_LABELS
from isthmus.errors import DataError, UsageError
from isthmus.training.lines import at_line, lines_of

ROLES = ("system", "user", "assistant")
SHAPES = '{"text"}, {"prompt", "completion"}, {"messages"}, {"prompt", "choices", "answer"} or {"text", "label"}'
KEYS = ("text", "prompt", "completion", "messages", "choices", "answer", "label")
CLASSIFIED = frozenset({"text", "label"})

Label: TypeAlias = str | int


@dataclass(frozen=True)
class TokenSequence:
    """One row of tokens.

    Attributes:
        ids: token ids.
        counted: one flag per token: whether it is a target, predicted from the position before it. The first is not.
        padding: the id that stands behind it in a batch; what a classifier takes for no token.
    """

    ids: tuple[int, ...]
    counted: tuple[bool, ...]
    padding: int = 0


@dataclass(frozen=True)
class Example:
    """One row of the file.

    Attributes:
        train: the sequence that training takes the loss on.
        choices: the sequences that scoring compares, alike up to their first target; empty for rows without choices.
        answer: index of the right choice, or the label's number; None for rows without either.
        labelled: a classifier's: all labels compete with the one that `train` ends in.
    """

    train: TokenSequence
    choices: tuple[TokenSequence, ...] = ()
    answer: int | None = None
    labelled: bool = False


@dataclass(frozen=True)
class Dataset:
    """A file's rows in its order, and how many of them were too long and lost tokens."""

    examples: tuple[Example, ...]
    truncated: int


def read_labels(path: Path) -> tuple[Label, ...] | None:
    """The labels of a data file, in order; None where its first row has none.

    Raises:
        DataError: as `read_examples`; or labels are too few or too many, or of two kinds.
    """
    found: set[Label] = set()
    for number, _, row in lines_of(path, SHAPES):
        if row.keys() != CLASSIFIED:
            if not found:
                return None
            raise DataError(f"{path}:{number}: has no label, and the rows before it do; give every row one")
        with at_line(path, number):
            found.add(_label(row["label"]))
    if len({type(label) for label in found}) > 1:
        raise DataError(f"{path}: labels are strings in some rows and integers in others; write them all one way")
    if not FEWEST_LABELS <= len(found) <= MOST_LABELS:
        raise DataError(
            f"{path}: has {len(found)} labels where {FEWEST_LABELS} to {MOST_LABELS:,} can be told "
            "apart; check its rows"
        )
    return tuple(sorted(found))


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that a classifier takes for no token: the tokenizer's own, or its end of sequence, or 0."""
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(one) for one in given if one is not None), 0)


def read_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[Label] | None = None
) -> Dataset:
    """Read a data file; blank lines are skipped.

    A row of more than `max_length` tokens loses the end of its text, or the beginning of its prompt.

    Args:
        path: of the file.
        tokenizer: the model's.
        max_length: tokens of a row at most.
        labels: a classifier's, in order; None: the rows are for a language model.

    Raises:
        UsageError: `max_length` is below 2, which leaves no token to predict.
        DataError: the file cannot be read or holds no rows, or a row is malformed; the message is
            `FILE:LINE: what; what to do`.
    """
    if max_length < 2:
        raise UsageError(f"the maximum length must be at least 2 tokens, not {max_length}")
    encoder = Encoder(tokenizer, max_length, labels)
    examples: list[Example] = []
    for number, _, row in lines_of(path, SHAPES):
        with at_line(path, number):
            examples.append(encoder.example(row))
    return Dataset(tuple(examples), encoder.truncated)


def _text(value: object, name: str) -> str:
    """The value, if it is a string that a tokenizer can take."""
    if not isinstance(value, str):
        raise DataError(f"{name} is not a string; make it one")
    if not value:
        raise DataError(f"{name} is empty; fill it or leave the row out")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{name} holds half of a surrogate pair; write the whole character")
    return value


def _label(value: object) -> Label:
    """The value, if it is a label."""
    if type(value) is int:  # isinstance would take true for 1
        return value
    if not isinstance(value, str):
        raise DataError('"label" is neither a string nor an integer; make it one')
    return _text(value, '"label"')


def turns_of(value: object) -> list[dict[str, str]]:
    """The value, if it is a conversation with an assistant's turn to learn."""
    if not isinstance(value, list) or not value:
        raise DataError('"messages" is not a list of turns; write [{"role": ..., "content": ...}, ...]')
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            raise DataError(
                f'turn {number} of "messages" is not an object of exactly "role" and "content"; make it one'
            )
        if turn["role"] not in ROLES:
            raise DataError(f'turn {number} of "messages" has role {turn["role"]!r}; use one of {", ".join(ROLES)}')
        _text(turn["content"], f'turn {number} of "messages"')
    if value[0]["role"] == "assistant" or all(turn["role"] != "assistant" for turn in value):
        raise DataError('"messages" has no assistant turn after a first turn by somebody else; add one to learn from')
    return value


class Encoder:
    """Turns rows into token sequences and counts those that it shortens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[Label] | None = None
    ) -> None:
        self.labels = labels
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncated = 0
        bare = list(tokenizer("")["input_ids"])  # what the tokenizer's own default call puts around a text
        self.opening: list[int] = bare[:1] if bare[:1] == [tokenizer.bos_token_id] else []
        self.closing: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def example(self, row: dict[str, Any]) -> Example:
        """What a row of any shape is.

        Raises:
            DataError: it has none of the shapes, or its values are none.
        """
        shapes: dict[frozenset[str], Callable[..., Example]] = {
            frozenset({"text"}): self._from_text,
            frozenset({"prompt", "completion"}): self._from_completion,
            frozenset({"messages"}): self._from_messages,
            frozenset({"prompt", "choices", "answer"}): self.from_choices,
            CLASSIFIED: self._from_label,
        }
        for key in row:
            if key not in KEYS:
                raise DataError(f"has the unknown key {key!r}; accepted are {SHAPES}")
        if (row.keys() == CLASSIFIED) != (self.labels is not None):
            if self.labels is None:
                raise DataError("has a label, and the first row of what was trained on has none; write all rows alike")
            raise DataError('is no {"text", "label"} row, as what was trained on is; write it so')
        if frozenset(row) not in shapes:
            raise DataError(f"has {', '.join(map(repr, row)) or 'no keys'}, which is no shape; accepted are {SHAPES}")
        return shapes[frozenset(row)](**row)

    def _from_text(self, text: object) -> Example:
        ids = self.opening + self.ids_of(text, '"text"') + self.closing
        if len(ids) < 2:
            raise DataError('"text" is a single token, so that nothing is predicted; lengthen it or leave the row out')
        self.truncated += len(ids) > self.max_length
        kept = ids[: self.max_length]
        return Example(TokenSequence(tuple(kept), (False, *[True] * (len(kept) - 1))))

    def _from_completion(self, prompt: object, completion: object) -> Example:
        context = self.opening + self.ids_of(prompt, '"prompt"')
        end = self.ids_of(completion, '"completion"') + self.closing
        return Example(self.fit(context, [False] * len(context), [end])[0])

    def from_choices(self, prompt: object, choices: object, answer: object) -> Example:
        """A prompt with each of several ends.

        Raises:
            DataError: they are none, or no prompt is left beside the longest.
        """
        if not isinstance(choices, list) or len(choices) < 2:
            raise DataError('"choices" is not a list of at least two strings; make it one')
        if type(answer) is not int or not 0 <= answer < len(choices):  # isinstance would take true for 1
            raise DataError(f'"answer" is not the index of a choice; make it an integer from 0 to {len(choices) - 1}')
        context = self.opening + self.ids_of(prompt, '"prompt"')
        ends = [self.ids_of(choice, f'choice {index} of "choices"') for index, choice in enumerate(choices)]
        sequences = self.fit(context, [False] * len(context), ends)
        return Example(sequences[answer], sequences, answer)

    def _from_label(self, text: object, label: object) -> Example:
        known, said = list(self.labels or ()), _label(label)
        if said not in known:
            listed = ", ".join(map(repr, known[:8])) + (", ..." if len(known) > 8 else "")
            raise DataError(f"the label {said!r} is none of the run's: {listed}; correct it or leave the row out")
        answer = known.index(said)
        return Example(self.labelled(text, answer), (), answer, labelled=True)

    def labelled(self, text: object, number: int = 0) -> TokenSequence:
        """A text and a label's number behind it; what the tokenizer puts around a text stays around it where it is cut.

        Raises:
            DataError: it is none, or holds no tokens.
        """
        longest = min(self.max_length, self.tokenizer.model_max_length)
        whole = _text(text, '"text"')
        ids = list(self.tokenizer(whole, verbose=False)["input_ids"])
        if len(ids) > longest:
            self.truncated += 1
            ids = list(self.tokenizer(whole, truncation=True, max_length=longest)["input_ids"])
        padding = padding_of(self.tokenizer)
        if not ids or ids[-1] == padding:
            raise DataError('"text" has no tokens for this tokenizer, or ends in the one for padding; change it')
        return TokenSequence((*ids, number), (*[False] * len(ids), True), padding)

    def _from_messages(self, messages: object) -> Example:
        """What the template puts before an assistant's turn is context; what the turn adds to that is its target."""
        turns, done = turns_of(messages), ""
        context: list[int] = []
        counted: list[bool] = []
        end: list[int] = []
        for number in [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]:
            before, after = self.render(turns[:number], prompt=True), self.render(turns[: number + 1], prompt=False)
            if not (before.startswith(done) and after.startswith(before) and len(done) < len(before) < len(after)):
                raise DataError(
                    f"the chat template does not extend its own prefix at turn {number}, so that the turn's tokens "
                    'cannot be told apart; write {"prompt", "completion"} rows instead'
                )
            between = self.tokens_of(before[len(done) :])
            context += end + between
            counted += [True] * len(end) + [False] * len(between)
            end, done = self.tokens_of(after[len(before) :]), after
        return Example(self.fit(context, counted, [end])[0])

    def render(self, turns: list[dict[str, str]], prompt: bool) -> str:
        """A conversation as the template writes it, with or without the words that ask for the next answer."""
        if not self.tokenizer.chat_template:
            raise DataError('"messages" needs a chat template, which the model lacks; write {"prompt", "completion"}')
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
        except (TemplateError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"the chat template refuses the conversation ({reason}); change its turns") from error

    def fit(self, context: list[int], counted: list[bool], ends: list[list[int]]) -> tuple[TokenSequence, ...]:
        """The context before each of the ends, shortened after its opening until the longest of them fits."""
        opening = len(self.opening) if context[: len(self.opening)] == self.opening else 0
        longest = max(len(end) for end in ends)
        excess = max(0, len(context) + longest - self.max_length)
        if excess >= len(context) - opening:
            raise DataError(
                f"what follows the prompt has {longest} tokens, which leaves no room for a prompt token within the "
                f"maximum length of {self.max_length}; raise --max-length or shorten the row"
            )
        self.truncated += excess > 0
        kept = tuple(context[:opening] + context[opening + excess :])
        flags = (False, *counted[len(counted) - len(kept) + 1 :])  # nothing predicts the first token
        return tuple(TokenSequence(kept + tuple(end), flags + (True,) * len(end)) for end in ends)

    def ids_of(self, value: object, name: str) -> list[int]:
        """The tokens of a row's value, without special ones."""
        ids = self.tokens_of(_text(value, name))
        if not ids:
            raise DataError(f"{name} has no tokens for this tokenizer; change it or leave the row out")
        return ids

    def tokens_of(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
