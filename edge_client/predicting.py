"""A run's answers to the rows of a file, written beside them in the file's order.

Knows how rows are batched and what a line of answers looks like; knows no shape of a row, and scores nothing.
"""

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel, device_of
from edge_client.finished import Using, reassembled
from edge_client.generation import WHOLE_TEXT_AGAIN, added_to, longest_text, text_of
from edge_client.questions import ADDED, Choose, GoOn, Question, Questions, Row, read_rows
from edge_client.tuning import Tuning
from isthmus.errors import UsageError
from isthmus.ledger.record import Ledger
from isthmus.training.data import Example
from isthmus.training.progress import meter
from isthmus.training.scoring import score

SORTED_TOGETHER = 8
"""Batches whose rows are sorted by length; answers of earlier ones are on disk."""

Answer = dict[str, Any]
"""What is added to a row."""


@dataclass(frozen=True)
class Predicted:
    """What became of a file's rows.

    Attributes:
        rows: answered now.
        present: answered before, by a command that this one went on with.
        shortened: rows of those answered now that lost the beginning of what they say.
        seconds: for the answers, without putting the model together.
        up_bytes, down_bytes: that crossed for them.
    """

    rows: int
    present: int
    shortened: int
    seconds: float
    up_bytes: int
    down_bytes: int


def predict(
    run: Path,
    data: Path,
    out: Path,
    using: Using,
    console: Console,
    new_tokens: int = 64,
    batch_size: int | None = None,
    resume: bool = False,
) -> Predicted:
    """Answer the rows of a file with a run's model, each line in `out` being the row and its answer.

    Args:
        run: directory of the run.
        data: the rows.
        out: where the answers go, as they come.
        using: how the run's model is put together again.
        console: where progress is shown.
        new_tokens: that are added to a text at most.
        batch_size: rows a request; None: the run's for scoring.
        resume: go on after the last whole line of `out`.

    Raises:
        UsageError: `out` holds something else, or cannot be written; or no prompt would fit before `new_tokens`.
        DataError: a row has none of the shapes.
        IsthmusError: whatever else stands in the way, each with its remedy.
    """
    rows, ledger = read_rows(data), Ledger()
    with _going_on(out, rows, resume) as (file, present):
        if present == len(rows):
            return Predicted(0, present, 0, 0.0, 0, 0)
        with reassembled(run, using, ledger, console) as (config, edge, tuning):
            reader = _questions(config, edge, tuning, new_tokens)
            asked = [reader.of(row) for row in rows[present:]]
            _say_first(console, asked, reader.shortened, config, tuning)
            answering = _Answering(edge, tuning, new_tokens, batch_size or config.eval_batch_size)
            began = time.perf_counter()
            with edge.phase("generate"), meter(console, "predict", len(rows), present) as progress:
                for done, answer in enumerate(answering.of(asked), start=present):
                    _write(file, out, rows[done], answer)
                    progress.update(done + 1)
            seconds = time.perf_counter() - began
    crossed = (int(ledger.total("generate", way)) for way in ("up_bytes", "down_bytes"))
    return Predicted(len(asked), present, reader.shortened, seconds, *crossed)


def _questions(config: TrainConfig, edge: EdgeModel, tuning: Tuning, new_tokens: int) -> Questions:
    row_tokens = edge.longest(config.max_length, tuning.virtual_tokens)
    if config.labels is not None:
        return Questions(edge.tokenizer, row_tokens, row_tokens, config.labels)
    longest = longest_text(edge, tuning)
    prompt_tokens = row_tokens if longest is None else min(row_tokens, longest - new_tokens)
    if prompt_tokens < 2:
        raise UsageError(
            f"--max-new-tokens {new_tokens} leaves no room for a prompt in the model's {longest} tokens; lower it"
        )
    return Questions(edge.tokenizer, prompt_tokens, row_tokens)


def _say_first(
    console: Console, asked: Sequence[Question], shortened: int, config: TrainConfig, tuning: Tuning
) -> None:
    if shortened:
        lost = f"{shortened} of {len(asked)} rows are too long and lose the beginning of their text"
        console.print(f"{lost} (the run's --max-length is {config.max_length})", soft_wrap=True)
    if tuning.side is not None and any(isinstance(question, GoOn) for question in asked):
        console.print(WHOLE_TEXT_AGAIN, soft_wrap=True)


class _Answering:
    """Answers questions in batches of like length, in their order."""

    def __init__(self, edge: EdgeModel, tuning: Tuning, new_tokens: int, batch_size: int) -> None:
        self._edge = edge
        self._tuning = tuning
        self._new_tokens = new_tokens
        self._batch_size = batch_size

    def of(self, asked: Sequence[Question]) -> Iterator[Answer]:
        """An answer for each question, as soon as it and all before it are known."""
        together = SORTED_TOGETHER * self._batch_size
        for start in range(0, len(asked), together):
            some, ready, first = asked[start : start + together], dict[int, Answer](), 0
            for answers in self._batches(some):
                ready |= answers
                while first in ready:
                    yield ready.pop(first)
                    first += 1

    def _batches(self, asked: Sequence[Question]) -> Iterator[dict[int, Answer]]:
        choosing = {at: question for at, question in enumerate(asked) if isinstance(question, Choose)}
        if choosing:
            yield dict(zip(choosing, self._choices(list(choosing.values())), strict=True))
        going_on = {at: question.ids for at, question in enumerate(asked) if isinstance(question, GoOn)}
        for batch in self._alike({at: len(ids) for at, ids in going_on.items()}):
            yield dict(zip(batch, self._texts([going_on[at] for at in batch]), strict=True))

    def _alike(self, lengths: dict[int, int]) -> Iterator[list[int]]:
        """Batches of like lengths; of equal ones where padding would stand between virtual tokens and a row."""
        ordered = sorted(lengths, key=lengths.__getitem__)
        for _, rows in groupby(ordered, lambda at: lengths[at] if self._tuning.virtual_tokens else 0):
            chosen = list(rows)
            yield from (chosen[at : at + self._batch_size] for at in range(0, len(chosen), self._batch_size))

    def _texts(self, prompts: Sequence[Sequence[int]]) -> Iterator[Answer]:
        for added in added_to(self._edge, self._tuning, prompts, self._new_tokens):
            yield {"prediction": text_of(self._edge, added)}

    def _choices(self, asked: Sequence[Choose]) -> Iterator[Answer]:
        """Scored as `evaluate` does, each choice in the place of what training takes the loss on."""
        examples = [Example(sequence) for question in asked for sequence in question.sequences]
        nats = iter(score(self._tuning.model, examples, self._batch_size, device_of(self._edge)).nats)
        for question in asked:
            likelihoods = [-value for value in islice(nats, len(question.choices))]
            likeliest = question.choices[likelihoods.index(max(likelihoods))]
            probabilities = torch.tensor(likelihoods, dtype=torch.float64).softmax(0).tolist()
            yield {"prediction": likeliest, "probabilities": probabilities}


@contextmanager
def _going_on(out: Path, rows: Sequence[Row], resume: bool) -> Iterator[tuple[FileIO, int]]:
    """The file of answers, nobody else's while in here, and how many are in it; a torn last line is cut off."""
    try:
        file = out.open("a+b", buffering=0)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing {out}; wait for it, or choose another --out") from None
        content = out.read_bytes()
        if content and not resume:
            raise UsageError(f"{out} is there already; go on with --resume, or choose another --out")
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode(errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, start=1):
            if number > len(rows) or not _answers(line, rows[number - 1]):
                raise UsageError(f"{out}:{number} is no answer to a row of --data in its place; choose another --out")
        file.truncate(len(whole))
        yield file, len(lines)


def _answers(line: str, row: Row) -> bool:
    """Whether a line is a row with its answer."""
    try:
        return line.startswith(f'{_opened(row)}, "{ADDED[0]}": ') and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _opened(row: Row) -> str:
    """A row's line without its closing brace: what it holds is carried through as it was written."""
    return row.line[:-1].rstrip()


def _write(file: FileIO, out: Path, row: Row, answer: Answer) -> None:
    left = f"{_opened(row)}, {json.dumps(answer, ensure_ascii=False)[1:]}\n".encode()
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); make room, and go on with --resume") from None
