"""The labels that a run tells apart: read from its data into its settings, and said.

Knows settings and rows; knows no model.
"""

from collections import Counter

from edge_client.config import TrainConfig
from edge_client.opening import credentials_for
from isthmus.training.data import Dataset, Label, read_labels

SHOWN = 12


def with_labels(config: TrainConfig) -> TrainConfig:
    """The settings with the labels of the data, if its rows have some; a server that cannot be meant is told first.

    Raises:
        UsageError: the server's address makes no sense, or a classifier cannot be trained so.
        DataError: the data cannot be read, or its labels cannot be told apart.
    """
    if config.server is not None:
        credentials_for(config, config.server)
    return config.labelled(read_labels(config.data))


def in_words(labels: tuple[Label, ...], data: Dataset) -> str:
    """How many rows have which label, so that a misspelt one is seen."""
    rows = Counter(example.answer for example in data.examples)
    told = [f"{label!r} ({rows[number]:,} rows)" for number, label in enumerate(labels[:SHOWN])]
    return f"{len(labels):,} labels: {', '.join(told)}" + (", ..." if len(labels) > len(told) else "")
