"""The data of the rows that compare methods: of each domain as many rows to train on as hold one number of tokens.

Knows domains, files and a tokenizer; trains nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from demo import reviews
from isthmus.command import cache_directory

PREFIX = "methods/"
TOKENS, BATCH, HELD_OUT = 8_000, 8, 500


@dataclass(frozen=True)
class DomainRows:
    """Rows to train on, whole batches of about `TOKENS` tokens, and rows held out."""

    train: Path
    held_out: Path

    @classmethod
    def of(cls, domain: reviews.Domain, model: Path) -> "DomainRows":
        """A domain's files, written anew; `model` is the directory whose tokenizer counts."""
        directory = kept() / "data"
        whole, held_out = reviews.prepare(directory, domain, HELD_OUT)
        lines = whole.read_text(encoding="utf-8").splitlines()
        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = [row["prompt"] + row["completion"] for row in map(json.loads, lines)]
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        train = directory / f"{domain}-{TOKENS}-tokens.jsonl"
        train.write_text("".join(f"{line}\n" for line in lines[: enough(lengths)]), encoding="utf-8")
        return cls(train, held_out)


def enough(lengths: Sequence[int]) -> int:
    """How many rows of these lengths, whole batches, have at least `TOKENS` tokens; all whole batches if none have."""
    told = 0
    for number, length in enumerate(lengths, start=1):
        told += length
        if told >= TOKENS and number % BATCH == 0:
            return number
    return len(lengths) // BATCH * BATCH


def kept() -> Path:
    """Where data, emulators and runs of these rows stay."""
    return cache_directory() / "benchmarks" / PREFIX
