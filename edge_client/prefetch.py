"""Filling the cache ahead of a run: every row that it will ask for, each once, rows of like length together.

Knows data files, rows and the cache's outputs; trains nothing. What is there already is not fetched again, so that a
prefetch that was stopped goes on where it was.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from edge_client.assemble import assembled
from edge_client.cached import Outputs, Row
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel, answers_where_wanted
from edge_client.labels import with_labels
from isthmus.errors import InterruptedRunError, UsageError
from isthmus.ledger.record import Ledger
from isthmus.settings import read_yaml, validated
from isthmus.training.data import Example, TokenSequence, read_examples
from isthmus.training.progress import meter
from isthmus.training.scoring import queries
from isthmus.training.stopping import stopping

IN_FLIGHT = 2
"""Requests under way: the cloud computes one while the other travels."""


@dataclass(frozen=True)
class Prefetched:
    """What a prefetch found and did: distinct rows, those there, those fetched, and bytes without those of the ends."""

    rows: int
    present: int
    fetched: int
    up_bytes: int
    down_bytes: int

    def as_dict(self) -> dict[str, int]:
        """The figures by name."""
        return asdict(self)


def settings_of(file: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """A run's settings from a file, such as its `config.yaml`, and flags; `--method split --train top` unless told.

    Raises:
        UsageError: they make no sense.
    """
    given = read_yaml(file) if file is not None else {}
    given |= {name: value for name, value in flags.items() if value is not None}
    given.setdefault("method", "split")
    if given["method"] == "split":
        given.setdefault("train", "top")
    return validated(TrainConfig, given, file)


def prefetch(config: TrainConfig, console: Console) -> Prefetched:
    """Fill the cache with the rows of `config`'s data, and of its evaluation data if there is some.

    Raises:
        UsageError: outputs change in such a run, so that nothing can be kept.
        InterruptedRunError: stopped by the user; what was fetched is kept.
    """
    if not config.forward_only:
        raise UsageError("only outputs that never change can be kept: prefetch for --train top or --method side")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.deterministic)
    ledger, config = Ledger(), with_labels(config)
    with assembled(config, ledger, console) as edge, edge.phase("fetch"):
        return _fill(config, edge, ledger, console)


def _fill(config: TrainConfig, edge: EdgeModel, ledger: Ledger, console: Console) -> Prefetched:
    outputs = edge.cached_outputs()
    ends = {way: int(ledger.total("fetch", f"{way}_bytes")) for way in ("up", "down")}  # which connecting fetched
    wanted = _rows(config, edge)
    missing = sorted(_missing(wanted, outputs, console), key=lambda row: len(row.ids))
    batches = [
        missing[start : start + config.eval_batch_size] for start in range(0, len(missing), config.eval_batch_size)
    ]
    _fetch(batches, outputs, ledger, ends, console)
    if any(row not in outputs for row in wanted):
        console.print("the cache is too small for all rows: raise --cache-limit, or the run fetches some again")
    up, down = (int(ledger.total("fetch", f"{way}_bytes")) - ends[way] for way in ("up", "down"))
    return Prefetched(len(wanted), len(wanted) - len(missing), len(missing), up, down)


def _missing(rows: list[Row], outputs: Outputs, console: Console) -> list[Row]:
    missing = []
    with stopping() as asked, meter(console, "look what is there, rows", len(rows)) as progress:
        for number, row in enumerate(rows, start=1):
            if row not in outputs:
                missing.append(row)
            progress.update(number)
            if asked:
                raise InterruptedRunError("stopped before anything was fetched; the same command begins again")
    return missing


def _fetch(batches: list[list[Row]], outputs: Outputs, ledger: Ledger, ends: dict[str, int], console: Console) -> None:
    tokens = [sum(len(row.ids) for row in batch) for batch in batches]
    done = 0
    pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="prefetch")
    try:
        with stopping() as asked, meter(console, "prefetch, tokens", sum(tokens)) as progress:
            for size, _ in zip(tokens, pool.map(lambda batch: len(outputs.of(batch)), batches), strict=True):
                done += size
                up, down = ((ledger.total("fetch", f"{way}_bytes") - ends[way]) / 1e6 for way in ("up", "down"))
                progress.update(done, f"up {up:.1f} MB  down {down:.1f} MB")
                if asked:
                    raise InterruptedRunError("stopped; what was fetched is kept: the same command goes on from here")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what is under way ends with the line


def _rows(config: TrainConfig, edge: EdgeModel) -> list[Row]:
    """What a run on these files asks for, each row once."""

    def examples(path: Path) -> tuple[Example, ...]:
        return read_examples(path, edge.tokenizer, edge.longest(config.max_length), config.labels).examples

    sequences: list[TokenSequence] = [example.train for example in examples(config.data)]
    if config.eval_data is not None:
        sequences += [query.sequence for query in queries(examples(config.eval_data))]
    topmost = answers_where_wanted(edge.cut, edge.found)
    rows = (
        Row(sequence.ids[:-1], 0, sequence.counted[1:] if topmost else None)  # as a batch has them
        for sequence in sequences
    )
    return list({row.key: row for row in rows}.values())
