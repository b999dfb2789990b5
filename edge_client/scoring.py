"""How good a model is on held-out rows: loss per token that counts, and accuracy by the choices' likelihood.

Knows examples and a model to call; knows no training and no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from edge_client.collate import Batch, logits_where_wanted
from edge_client.data import Example, TokenSequence

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


@dataclass(frozen=True)
class Scores:
    """`loss` in nats per counted token; `correct` per row with choices, in the rows' order; tokens as computed."""

    rows: int
    loss: float
    correct: tuple[bool, ...]
    real_tokens: int
    padded_tokens: int

    @property
    def accuracy(self) -> float | None:
        """Share of rows with choices whose right choice is the likeliest; None without such rows."""
        return sum(self.correct) / len(self.correct) if self.correct else None


@dataclass(frozen=True)
class _Query:
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
) -> Scores:
    """Score a model on examples.

    Choices that differ only in their last token share one run: the same position predicts each of them.
    """
    queries = sorted(_queries(examples), key=lambda query: len(query.sequence.ids))
    likelihood: dict[tuple[int, int], float] = {}
    tokens: dict[tuple[int, int], int] = {}
    real = padded = 0
    for start in range(0, len(queries), batch_size):
        chosen = queries[start : start + batch_size]
        batch = Batch.of([query.sequence for query in chosen])
        real, padded = real + batch.real_tokens, padded + batch.input_ids_BT.numel()
        log_probs_KV = logits_where_wanted(model, batch, device).log_softmax(-1).cpu()
        at = 0
        for query in chosen:
            width = sum(query.sequence.counted)
            for row, choice, sequence in query.asked:
                targets = [token for token, counts in zip(sequence.ids, sequence.counted, strict=True) if counts]
                picked = log_probs_KV[at : at + width].gather(1, torch.tensor(targets)[:, None])
                likelihood[row, choice] = float(picked.sum(dtype=torch.float64))
                tokens[row, choice] = len(targets)
            at += width
        if progress is not None:
            progress(min(start + batch_size, len(queries)), len(queries))
    counted = sum(tokens[row, -1] for row in range(len(examples)))
    loss = -sum(likelihood[row, -1] for row in range(len(examples))) / counted
    return Scores(len(examples), loss, _correct(examples, likelihood), real, padded)


def _correct(examples: Sequence[Example], likelihood: dict[tuple[int, int], float]) -> tuple[bool, ...]:
    correct = []
    for row, example in enumerate(examples):
        if example.choices:
            scores = [likelihood[row, choice] for choice in range(len(example.choices))]
            correct.append(scores.index(max(scores)) == example.answer)
    return tuple(correct)


def _queries(examples: Sequence[Example]) -> list[_Query]:
    """The runs that are needed: sequences with the same inputs and the same counted positions share one."""
    found: dict[tuple[tuple[int, ...], tuple[bool, ...]], _Query] = {}
    for row, example in enumerate(examples):
        for choice, sequence in [(-1, example.train), *enumerate(example.choices)]:
            key = (sequence.ids[:-1], sequence.counted)
            found.setdefault(key, _Query(sequence, [])).asked.append((row, choice, sequence))
    return list(found.values())
