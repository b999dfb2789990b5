"""How good a model is on held-out rows: loss per token that counts, and accuracy by the choices' likelihood.

Knows examples and a model to call; knows no training and no files. Figures stay per row, so that two scores of the
same rows can be compared row by row.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isthmus.errors import RunError
from isthmus.training.collate import Batch, logits_where_wanted
from isthmus.training.data import Example, TokenSequence

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""

Ran = Callable[[Batch, float], None]
"""Called with each batch that the model was run on, and the seconds that took."""


@dataclass(frozen=True)
class Scores:
    """Figures per row, in the rows' order, and the tokens that were run for all of them.

    Attributes:
        nats: negative log-likelihood of each row's counted tokens, summed.
        tokens: how many tokens of each row counted.
        correct: whether the right choice or label was the likeliest, for each row with some; others have no place here.
        real_tokens: tokens run, without padding.
        padded_tokens: positions run, padding included.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    correct: tuple[bool, ...]
    real_tokens: int
    padded_tokens: int

    @property
    def rows(self) -> int:
        """How many rows were scored."""
        return len(self.nats)

    @property
    def loss(self) -> float:
        """Nats per counted token of all rows."""
        return sum(self.nats) / sum(self.tokens)

    @property
    def accuracy(self) -> float | None:
        """Share of rows with choices whose right choice is the likeliest; None without such rows."""
        return sum(self.correct) / len(self.correct) if self.correct else None

    @classmethod
    def restored(cls, facts: Mapping[str, Any]) -> "Scores":
        """The scores whose `vars` have been JSON."""
        rows = {name: tuple(facts[name]) for name in ("nats", "tokens", "correct")}
        return cls(**{**facts, **rows})


@dataclass(frozen=True)
class Query:
    """One run of the model: inputs, and for each of `asked` the positions and tokens whose likelihood is summed."""

    sequence: TokenSequence
    asked: list[tuple[int, int, TokenSequence]]  # row, choice (-1: what training takes the loss on), its tokens


@torch.no_grad()
def score(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    device: torch.device,
    progress: Progress | None = None,
    ran: Ran | None = None,
) -> Scores:
    """Score a model on examples.

    Choices that differ only in their last token share one run: the same position predicts each of them.

    Raises:
        RunError: a figure is not finite, so that nothing can be told.
    """
    ordered = sorted(queries(examples), key=lambda query: len(query.sequence.ids))
    likelihood: dict[tuple[int, int], float] = {}
    likeliest: dict[int, int] = {}
    tokens: dict[tuple[int, int], int] = {}
    real = padded = 0
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        batch = Batch.of([query.sequence for query in chosen])
        real, padded = real + batch.real_tokens, padded + batch.input_ids_BT.numel()
        began = time.perf_counter()
        log_probs_KV = logits_where_wanted(model, batch, device).log_softmax(-1).cpu()
        if ran is not None:
            ran(batch, time.perf_counter() - began)
        at = 0
        for query in chosen:
            width = sum(query.sequence.counted)
            for row, choice, sequence in query.asked:
                if examples[row].labelled:
                    likeliest[row] = int(log_probs_KV[at].argmax())
                targets = [token for token, counts in zip(sequence.ids, sequence.counted, strict=True) if counts]
                picked = log_probs_KV[at : at + width].gather(1, torch.tensor(targets)[:, None])
                likelihood[row, choice] = _finite(float(picked.sum(dtype=torch.float64)), row)
                tokens[row, choice] = len(targets)
            at += width
        if progress is not None:
            progress(min(start + batch_size, len(ordered)), len(ordered))
    trained = [(row, -1) for row in range(len(examples))]
    nats, counted = (tuple(-likelihood[key] for key in trained), tuple(tokens[key] for key in trained))
    return Scores(nats, counted, _correct(examples, likelihood, likeliest), real, padded)


def _finite(likelihood: float, row: int) -> float:
    if not math.isfinite(likelihood):
        raise RunError(
            f"row {row + 1} has a log-likelihood of {likelihood}: the model's outputs are not finite; "
            "train with a lower --lr, or use a finer --codec"
        )
    return likelihood


def _correct(
    examples: Sequence[Example], likelihood: dict[tuple[int, int], float], likeliest: dict[int, int]
) -> tuple[bool, ...]:
    correct = []
    for row, example in enumerate(examples):
        if example.labelled:
            correct.append(likeliest[row] == example.answer)
        elif example.choices:
            scores = [likelihood[row, choice] for choice in range(len(example.choices))]
            correct.append(scores.index(max(scores)) == example.answer)
    return tuple(correct)


def queries(examples: Sequence[Example]) -> list[Query]:
    """The runs that are needed: sequences with the same inputs and the same counted positions share one."""
    found: dict[tuple[tuple[int, ...], tuple[bool, ...]], Query] = {}
    for row, example in enumerate(examples):
        for choice, sequence in [(-1, example.train), *enumerate(example.choices)]:
            key = (sequence.ids[:-1], sequence.counted)
            found.setdefault(key, Query(sequence, [])).asked.append((row, choice, sequence))
    return list(found.values())
