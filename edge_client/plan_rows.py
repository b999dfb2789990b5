"""The rows that a plan is made for: as long as was said, or as a file of rows has them.

Knows rows, tokenizers and batches; knows no costs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from transformers import PreTrainedConfig

from edge_client.config import TrainConfig
from edge_client.plan_settings import USUAL_ROWS, PlanSettings
from isthmus.architectures import longest_row
from isthmus.errors import ModelError, UsageError
from isthmus.load import load_tokenizer
from isthmus.planning.configurations import find
from isthmus.planning.workload import Workload
from isthmus.training.batches import epoch_batches
from isthmus.training.data import read_examples

PARTS: Final = 6
"""Of a file's batches by their tokens: of each part the shortest batch and the longest are planned."""

TIDY: Final = 0.8
"""The share of real tokens from which on a batch counts as hardly padded; those below are parted by themselves."""


@dataclass(frozen=True)
class PlannedRows:
    """Rows without their tokens.

    Attributes:
        lengths: tokens of each row that are run: its last is only predicted. One alone where all rows are alike.
        losses: of each, positions that are learnt.
        count: of the rows.
        known: the rows are a whole data set, so that epochs have an end.
    """

    lengths: tuple[int, ...]
    losses: tuple[int, ...]
    count: int
    known: bool

    @classmethod
    def of(cls, settings: PlanSettings, configuration: PreTrainedConfig) -> "PlannedRows":
        """The rows that a plan was told of.

        Raises:
            UsageError: rows are longer than the model takes, or their lengths need a tokenizer that is not here.
            DataError: the file cannot be read as rows.
        """
        if settings.data is not None:
            return cls._read(settings.data, settings)
        length, limit = settings.asked_length, longest_row(configuration)
        if limit is not None and length > limit:
            raise UsageError(f"--length {length} is more than the {limit} tokens that this model takes; make it less")
        count = settings.rows
        if settings.tokens is not None:
            count = max(1, round(settings.tokens / length))
        elif count is None and "steps" not in settings.run:
            count = USUAL_ROWS
        return cls((length,), (settings.losses or max(1, length - 1),), count or 1, count is not None)

    @classmethod
    def _read(cls, path: Path, settings: PlanSettings) -> "PlannedRows":
        try:
            tokenizer = load_tokenizer(find(settings.model).parent)
        except ModelError:
            raise UsageError(
                f"--data tells lengths by the model's tokenizer, and {settings.model!r:.80} has none beside its "
                "configuration; give a directory that has one, or --length and --rows"
            ) from None
        read = read_examples(path, tokenizer, settings.longest_kept)
        rows = [example.train for example in read.examples]
        lengths = tuple(len(row.ids) - 1 for row in rows)
        return cls(lengths, tuple(sum(row.counted[1:]) for row in rows), len(rows), known=True)

    def steps(self, config: TrainConfig) -> int:
        """Of a run with these settings."""
        return config.count_steps(self.count)

    def steps_per_epoch(self, config: TrainConfig) -> int:
        """Of it; where there is no end of the rows all steps are of the first."""
        return math.ceil(self.count / config.batch_size) if self.known else self.steps(config)

    def workloads(self, config: TrainConfig) -> dict[Workload, float]:
        """Batches that stand for all of the run's first epoch, each with how many it stands for.

        Together they have the tokens of all. One that stands for none is there for its peak alone.
        """
        if len(set(zip(self.lengths, self.losses, strict=True))) == 1:
            return self._alike(config.batch_size)
        batches = epoch_batches(self.lengths, config.batch_size, config.seed, 0)[: self.steps(config)]
        found: dict[Workload, float] = {}
        for number, times in self._standing(batches, config.batch_size).items():
            workload = self._workload(batches[number])
            found[workload] = found.get(workload, 0.0) + times
        return found

    def _alike(self, size: int) -> dict[Workload, float]:
        full, left = divmod(self.count, size) if self.known else (1, 0)
        times = {size: float(full), left: 1.0}
        return {self._workload([0] * rows): count for rows, count in times.items() if rows and count}

    def _workload(self, batch: Sequence[int]) -> Workload:
        lengths, losses = tuple(self.lengths[row] for row in batch), tuple(self.losses[row] for row in batch)
        return Workload(lengths, losses, self.count if self.known else None)

    def _standing(self, batches: Sequence[Sequence[int]], size: int) -> dict[int, float]:
        """Numbers of batches, each with how many it stands for; one of fewer rows than `size` stands for itself."""
        tokens = [sum(self.lengths[row] for row in batch) for batch in batches]
        padded = [len(batch) * max(self.lengths[row] for row in batch) for batch in batches]
        learnt = [sum(self.losses[row] for row in batch) for batch in batches]
        full = [n for n, batch in enumerate(batches) if len(batch) == size]
        full.sort(key=lambda n: (tokens[n], learnt[n]))
        found: dict[int, float] = {}
        for tidy in (True, False):
            alike = [n for n in full if (tokens[n] >= TIDY * padded[n]) is tidy]
            for first, last in pairwise(len(alike) * part // PARTS for part in range(PARTS + 1)):
                found |= _ends(alike[first:last], tokens, learnt)
        found |= {n: 1.0 for n, batch in enumerate(batches) if len(batch) < size}
        most = {max(range(len(batches)), key=one.__getitem__): 0.0 for one in (tokens, padded, learnt)}
        return most | _calibrated(found, tokens, learnt)


def _ends(numbers: Sequence[int], *sizes: Sequence[int]) -> dict[int, float]:
    """The first and the last of these, sorted by sizes, as often as gives their number and the size that differs."""
    for size in sizes:
        low, high = (size[numbers[end]] if numbers else 0 for end in (0, -1))
        if low < high:
            last = sum(size[number] - low for number in numbers) / (high - low)
            return {numbers[0]: len(numbers) - last, numbers[-1]: last}
    return {number: float(len(numbers)) for number in numbers[:1]}


def _calibrated(found: Mapping[int, float], *sizes: Sequence[int]) -> dict[int, float]:
    """The same, with weights changed little and to none below 0, so that they give each size's sum over all.

    Deville and Sarndal, Calibration estimators in survey sampling, 1992: the linear case, and again without those that
    it would take below 0.
    """
    numbers, weights_S = list(found), np.array(list(found.values()))
    every_NF = np.stack([np.ones(len(sizes[0])), *(np.array(size) / max(1, max(size)) for size in sizes)], axis=1)
    some_SF = every_NF[numbers]
    for _ in numbers:
        missing_F = every_NF.sum(axis=0) - weights_S @ some_SF
        slopes_F = np.linalg.lstsq((some_SF.T * weights_S) @ some_SF, missing_F, rcond=1e-9)[0]
        changed_S = weights_S * (1 + some_SF @ slopes_F)
        weights_S = np.maximum(changed_S, 0.0)
        if changed_S.min() >= 0:
            break
    return dict(zip(numbers, map(float, weights_S), strict=True))
