"""JSON Lines to token sequences: what a row may look like, which of its tokens are learnt, what is refused.

Knows tokenizers; nothing of models, tensors or batches.

    {"text"}                          every token but the first is a target, the end of sequence included
    {"prompt", "completion"}          the completion and the end of sequence are targets
    {"messages": [{"role", "content"}, ...]}   by the chat template; every assistant turn is a target
    {"prompt", "choices", "answer"}   scoring compares the choices; training takes the right one
"""

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from isthmus.errors import DataError, UsageError

ROLES = ("system", "user", "assistant")
SHAPES = '{"text"}, {"prompt", "completion"}, {"messages"} or {"prompt", "choices", "answer"}'
KEYS = ("text", "prompt", "completion", "messages", "choices", "answer", "label")


@dataclass(frozen=True)
class TokenSequence:
    """One row of tokens.

    Attributes:
        ids: token ids.
        counted: one flag per token: whether it is a target, predicted from the position before it. The first is not.
    """

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


@dataclass(frozen=True)
class Example:
    """One row of the file.

    Attributes:
        train: the sequence that training takes the loss on.
        choices: the sequences that scoring compares, alike up to their first target; empty for rows without choices.
        answer: index of the right choice; None for rows without choices.
    """

    train: TokenSequence
    choices: tuple[TokenSequence, ...] = ()
    answer: int | None = None


@dataclass(frozen=True)
class Dataset:
    """A file's rows in its order, and how many of them were too long and lost tokens."""

    examples: tuple[Example, ...]
    truncated: int


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Read a data file; blank lines are skipped.

    A row of more than `max_length` tokens loses the end of its text, or the beginning of its prompt.

    Raises:
        UsageError: `max_length` is below 2, which leaves no token to predict.
        DataError: the file cannot be read or holds no rows, or a row is malformed; the message is
            `FILE:LINE: what; what to do`.
    """
    if max_length < 2:
        raise UsageError(f"the maximum length must be at least 2 tokens, not {max_length}")
    try:
        raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    encoder = _Encoder(tokenizer, max_length)
    examples: list[Example] = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                examples.append(encoder.example(_parse(line)))
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from error
    if not examples:
        raise DataError(f"{path}: holds no rows; write one JSON object a line: {SHAPES}")
    return Dataset(tuple(examples), encoder.truncated)


def _parse(line: bytes) -> dict[str, Any]:
    """The object that one line holds."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8; convert the file, for example with iconv") from error
    except json.JSONDecodeError as error:
        raise DataError(f"is not JSON ({error.msg} at column {error.colno}); write one object a line") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError("holds a number or nesting beyond what JSON readers take; simplify the row") from error
    if not isinstance(row, dict):
        raise DataError(f"is not a JSON object; accepted are {SHAPES}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, if no key stands in it twice."""
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise DataError(f"names the key {key!r} twice; keep one")
        row[key] = value
    return row


def _constant(name: str) -> NoReturn:
    raise DataError(f"holds {name}, which is not JSON; write a number or leave the row out")


def _text(value: object, name: str) -> str:
    """The value, if it is a string that a tokenizer can take."""
    if not isinstance(value, str):
        raise DataError(f"{name} is not a string; make it one")
    if not value:
        raise DataError(f"{name} is empty; fill it or leave the row out")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{name} holds half of a surrogate pair; write the whole character")
    return value


def _turns(value: object) -> list[dict[str, str]]:
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


class _Encoder:
    """Turns rows into token sequences and counts those that it shortens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncated = 0
        bare = list(tokenizer("")["input_ids"])  # what the tokenizer's own default call puts around a text
        self.opening: list[int] = bare[:1] if bare[:1] == [tokenizer.bos_token_id] else []
        self.closing: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def example(self, row: dict[str, Any]) -> Example:
        shapes: dict[frozenset[str], Callable[..., Example]] = {
            frozenset({"text"}): self._from_text,
            frozenset({"prompt", "completion"}): self._from_completion,
            frozenset({"messages"}): self._from_messages,
            frozenset({"prompt", "choices", "answer"}): self._from_choices,
        }
        for key in row:
            if key not in KEYS:
                raise DataError(f"has the unknown key {key!r}; accepted are {SHAPES}")
        if row.keys() == {"text", "label"}:
            raise DataError(
                "is for sequence classification, which this version does not support yet; "
                'write {"prompt", "choices", "answer"} instead'
            )
        if frozenset(row) not in shapes:
            raise DataError(f"has {', '.join(map(repr, row)) or 'no keys'}, which is no shape; accepted are {SHAPES}")
        return shapes[frozenset(row)](**row)

    def _from_text(self, text: object) -> Example:
        ids = self.opening + self._ids(text, '"text"') + self.closing
        if len(ids) < 2:
            raise DataError('"text" is a single token, so that nothing is predicted; lengthen it or leave the row out')
        self.truncated += len(ids) > self.max_length
        kept = ids[: self.max_length]
        return Example(TokenSequence(tuple(kept), (False, *[True] * (len(kept) - 1))))

    def _from_completion(self, prompt: object, completion: object) -> Example:
        context = self.opening + self._ids(prompt, '"prompt"')
        end = self._ids(completion, '"completion"') + self.closing
        return Example(self._fit(context, [False] * len(context), [end])[0])

    def _from_choices(self, prompt: object, choices: object, answer: object) -> Example:
        if not isinstance(choices, list) or len(choices) < 2:
            raise DataError('"choices" is not a list of at least two strings; make it one')
        if type(answer) is not int or not 0 <= answer < len(choices):  # isinstance would take true for 1
            raise DataError(f'"answer" is not the index of a choice; make it an integer from 0 to {len(choices) - 1}')
        context = self.opening + self._ids(prompt, '"prompt"')
        ends = [self._ids(choice, f'choice {index} of "choices"') for index, choice in enumerate(choices)]
        sequences = self._fit(context, [False] * len(context), ends)
        return Example(sequences[answer], sequences, answer)

    def _from_messages(self, messages: object) -> Example:
        """What the template puts before an assistant's turn is context; what the turn adds to that is its target."""
        turns, done = _turns(messages), ""
        context: list[int] = []
        counted: list[bool] = []
        end: list[int] = []
        for number in [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]:
            before, after = self._render(turns[:number], prompt=True), self._render(turns[: number + 1], prompt=False)
            if not (before.startswith(done) and after.startswith(before) and len(done) < len(before) < len(after)):
                raise DataError(
                    f"the chat template does not extend its own prefix at turn {number}, so that the turn's tokens "
                    'cannot be told apart; write {"prompt", "completion"} rows instead'
                )
            between = self._tokens(before[len(done) :])
            context += end + between
            counted += [True] * len(end) + [False] * len(between)
            end, done = self._tokens(after[len(before) :]), after
        return Example(self._fit(context, counted, [end])[0])

    def _render(self, turns: list[dict[str, str]], prompt: bool) -> str:
        """A conversation as the template writes it, with or without the words that ask for the next answer."""
        if not self.tokenizer.chat_template:
            raise DataError('"messages" needs a chat template, which the model lacks; write {"prompt", "completion"}')
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
        except (TemplateError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"the chat template refuses the conversation ({reason}); change its turns") from error

    def _fit(self, context: list[int], counted: list[bool], ends: list[list[int]]) -> tuple[TokenSequence, ...]:
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

    def _ids(self, value: object, name: str) -> list[int]:
        """The tokens of a row's value, without special ones."""
        ids = self._tokens(_text(value, name))
        if not ids:
            raise DataError(f"{name} has no tokens for this tokenizer; change it or leave the row out")
        return ids

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
