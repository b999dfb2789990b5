"""The rows that a plan is made for: as long as was said, or as a file of rows has them.

Knows rows, tokenizers and batches; knows no costs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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

LOOKED_AT: Final = 16
"""Batches of a file's rows that a plan takes the mean of: they differ, and each is planned by itself."""


@dataclass(frozen=True)
class PlannedRows:
    """Rows without their tokens.

    Attributes:
        lengths: tokens of each row.
        losses: of them, those that are learnt.
        known: the rows are a whole data set, so that epochs have an end.
    """

    lengths: tuple[int, ...]
    losses: tuple[int, ...]
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
        rows = count or 1
        return cls((length,) * rows, ((settings.losses or length - 1),) * rows, count is not None)

    @classmethod
    def _read(cls, path: Path, settings: PlanSettings) -> "PlannedRows":
        try:
            tokenizer = load_tokenizer(find(settings.model).parent)
        except ModelError:
            raise UsageError(
                f"--data tells lengths by the model's tokenizer, and {settings.model!r:.80} has none beside its "
                "configuration; give a directory that has one, or --length and --rows"
            ) from None
        read = read_examples(path, tokenizer, settings.configured({}).max_length)
        rows = [example.train for example in read.examples]
        return cls(tuple(len(row.ids) for row in rows), tuple(sum(row.counted) for row in rows), known=True)

    def steps(self, config: TrainConfig) -> int:
        """Of a run with these settings."""
        return config.count_steps(len(self.lengths))

    def steps_per_epoch(self, config: TrainConfig) -> int:
        """Of it; where there is no end of the rows all steps are of the first."""
        return math.ceil(len(self.lengths) / config.batch_size) if self.known else self.steps(config)

    def workloads(self, config: TrainConfig) -> list[Workload]:
        """Batches of the run that stand for all of them."""
        rows = len(self.lengths) if self.known else None
        if len(set(zip(self.lengths, self.losses, strict=True))) == 1:
            count = config.batch_size if rows is None else min(config.batch_size, rows)
            return [Workload(self.lengths[:1] * count, self.losses[:1] * count, rows)]
        batches = epoch_batches(self.lengths, config.batch_size, config.seed, 0)
        return [
            Workload(tuple(self.lengths[row] for row in batch), tuple(self.losses[row] for row in batch), rows)
            for batch in _spread(batches)
        ]


def _spread(batches: Sequence[list[int]]) -> list[list[int]]:
    count = min(LOOKED_AT, len(batches))
    return [batches[len(batches) * number // count] for number in range(count)]
