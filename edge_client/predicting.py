"""A run's answers to the rows of a file, written beside them in the file's order.

Knows how rows are batched; knows no shape of a row and no file of answers, and scores nothing.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
from rich.console import Console

from edge_client.answer_file import Answer, MadeBy, going_on, write
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel, device_of
from edge_client.finished import Using, adapter_used, reassembled, span_kind, unlocked
from edge_client.generation import WHOLE_TEXT_AGAIN, added_to, longest_text, text_of
from edge_client.questions import Choose, GoOn, Question, Questions, read_rows
from edge_client.runs import RunDirectory
from edge_client.sealed_lines import SealedLines
from edge_client.tuning import Tuning
from isthmus.errors import RunError, UsageError
from isthmus.ledger.record import Ledger
from isthmus.training.data import Example
from isthmus.training.progress import meter
from isthmus.training.scoring import score

SORTED_TOGETHER = 8
"""Batches whose rows are sorted by length; answers of earlier ones are on disk."""


@dataclass(frozen=True)
class Predicted:
    """What became of a file's rows.

    Attributes:
        rows: answered now.
        present: answered before, by a command that this one went on with.
        shortened: rows of those answered now that lost a part of what they say.
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

    Where the run is sealed, so are the lines.

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
        UsageError: `out` holds something else, or answers that were made otherwise, or cannot be written; or no prompt
            would fit before `new_tokens`.
        DataError: a row has none of the shapes.
        RunError: the run has no adapter, or a row's scores are not finite.
        IsthmusError: whatever else stands in the way, each with its remedy.
    """
    rows, ledger = read_rows(data), Ledger()
    seal = unlocked(run, using).seal
    sealed = SealedLines(out, seal) if seal is not None else None
    with going_on(out, rows, _made_by(run, using, new_tokens), resume, sealed) as (file, present):
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
                    write(file, out, rows[done], answer, done, sealed)
                    progress.update(done + 1)
            seconds = time.perf_counter() - began
    crossed = (int(ledger.total("generate", way)) for way in ("up_bytes", "down_bytes"))
    return Predicted(len(asked), present, reader.shortened, seconds, *crossed)


def _made_by(run: Path, using: Using, new_tokens: int) -> MadeBy:
    span = using.span or span_kind(RunDirectory(run).config())
    return {"adapter": adapter_used(run, using), "--span": span, "--max-new-tokens": new_tokens}


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
        lost = "beginning" if config.labels is None else "end"
        lost = f"{shortened} of {len(asked)} rows are too long and lose the {lost} of their text"
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
        nats = iter(self._nats(asked))
        for question in asked:
            likelihoods = [-value for value in islice(nats, len(question.choices))]
            likeliest = question.choices[likelihoods.index(max(likelihoods))]
            probabilities = torch.tensor(likelihoods, dtype=torch.float64).softmax(0).tolist()
            yield {"prediction": likeliest, "probabilities": probabilities}

    def _nats(self, asked: Sequence[Choose]) -> tuple[float, ...]:
        """Of every choice; where some are not finite, halves are asked again until one row is left to be named."""
        examples = [Example(sequence) for question in asked for sequence in question.sequences]
        try:
            return score(self._tuning.model, examples, self._batch_size, device_of(self._edge)).nats
        except RunError:
            if len(asked) == 1:
                raise RunError(
                    f"{asked[0].place}: the likelihoods of its choices are not finite; "
                    "train with a lower --lr, or use a finer --codec"
                ) from None
        half = len(asked) // 2
        return self._nats(asked[:half]) + self._nats(asked[half:])
