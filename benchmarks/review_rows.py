"""Movie reviews for benchmarks that train: rows to train on, rows to choose by, rows to report on.

Knows how many of each and where the files lie; trains nothing.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from demo import reviews
from isthmus.command import cache_directory


@dataclass(frozen=True)
class ReviewRows:
    """Files that rows of benchmarks under one prefix share, written when they are first asked for."""

    prefix: str
    trained: int
    validated: int
    reported: int

    @property
    def train(self) -> Path:
        """Rows to train on."""
        return self._files[0]

    @property
    def validation(self) -> Path:
        """Rows to choose by."""
        return self._files[1]

    @property
    def held_out(self) -> Path:
        """Rows to report on."""
        return self._files[2]

    @cached_property
    def _files(self) -> tuple[Path, Path, Path]:
        directory = cache_directory() / "benchmarks" / self.prefix / "data"
        training, held_out = reviews.prepare(directory, "movies", self.reported)
        lines = training.read_text(encoding="utf-8").splitlines()
        train, validation = directory / "train.jsonl", directory / "validation.jsonl"
        train.write_text("".join(f"{line}\n" for line in lines[: self.trained]), encoding="utf-8")
        chosen = map(_to_score, lines[self.trained : self.trained + self.validated])
        validation.write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
        return train, validation, held_out


def _to_score(line: str) -> str:
    row = json.loads(line)
    answer = reviews.CHOICES.index(row["completion"])
    return json.dumps({"prompt": row["prompt"], "choices": reviews.CHOICES, "answer": answer})
