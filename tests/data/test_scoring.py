"""Scores are right row by row, and survive a checkpoint and the disk to the last bit."""

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from edge_client.outcome import Standing, score_of
from edge_client.runs import RunDirectory
from isthmus.errors import RunError
from isthmus.training.data import Example, TokenSequence
from isthmus.training.outputs import wanted_positions
from isthmus.training.scoring import Scores, score

VOCABULARY = 11
CPU = torch.device("cpu")
UNEVEN = Scores(
    nats=(0.1 + 0.2, 1 / 3, 5e-324), tokens=(1, 7, 2), correct=(True, False), real_tokens=40, padded_tokens=48
)


class Bigram(nn.Module):
    """A model whose next token depends on the last one alone, so that every likelihood can be looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        wanted_BT = wanted_positions()
        assert wanted_BT is not None
        return SimpleNamespace(logits=self.table[input_ids[wanted_BT]][None])

    def nats(self, *ids: int) -> float:
        """Of every token but the first."""
        log_probs = self.table.log_softmax(-1)
        return -sum(float(log_probs[before, after]) for before, after in pairwise(ids))


def sequence(*ids: int, prompt: int = 1) -> TokenSequence:
    return TokenSequence(ids, tuple(place >= prompt for place in range(len(ids))))


LONG, SHORT = sequence(1, 2, 3, 4, 5, 6, 7, 8), sequence(9, 10)
CHOICES = (sequence(4, 5, 6, prompt=2), sequence(4, 5, 7, prompt=2))
EXAMPLES = [Example(LONG), Example(SHORT), Example(CHOICES[1], CHOICES, 1)]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_row_has_its_own_nats_and_counted_tokens_in_the_rows_order(batch_size: int) -> None:
    model = Bigram()
    scores = score(model, EXAMPLES, batch_size, CPU)
    assert scores.nats == pytest.approx((model.nats(*LONG.ids), model.nats(*SHORT.ids), model.nats(5, 7)), rel=1e-6)
    assert (scores.rows, scores.tokens) == (3, (7, 1, 1))
    assert scores.correct == (model.nats(5, 7) < model.nats(5, 6),)


def test_the_loss_is_that_of_all_tokens_and_not_the_mean_of_the_rows() -> None:
    scores = score(Bigram(), EXAMPLES, 2, CPU)
    by_row = [nats / tokens for nats, tokens in zip(scores.nats, scores.tokens, strict=True)]
    assert scores.loss == sum(scores.nats) / 9 == score_of(scores).loss
    assert not math.isclose(scores.loss, sum(by_row) / 3, rel_tol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_with_the_row_and_what_to_do(value: float) -> None:
    model = Bigram()
    model.table[9] = value
    with pytest.raises(
        RunError, match=r"^row 2 has a log-likelihood of nan: .*; train with a lower --lr, or .* --codec"
    ):
        score(model, EXAMPLES, 2, CPU)


@pytest.mark.parametrize("before", [UNEVEN, None])
def test_a_checkpoint_gives_the_standing_back_to_the_last_bit(before: Scores | None) -> None:
    standing = Standing(step=3, seconds=0.1, loss=1 / 7, before=before, real_tokens=5)
    assert Standing.restored(3, json.loads(json.dumps(standing.facts()))) == standing


def test_a_run_keeps_each_rows_figures_exactly_and_null_for_what_was_not_scored(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_scores(None, None)
    run.write_scores(UNEVEN, None)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    assert json.loads((tmp_path / "scores.json").read_text()) == {
        "schema": "isthmus-scores/1",
        "before": {"nats": list(UNEVEN.nats), "tokens": [1, 7, 2], "correct": [True, False]},
        "after": None,
    }
