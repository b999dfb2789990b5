"""What a classifier is told: how many labels it tells apart, and what its head is made from.

Knows numbers and configurations; knows no models.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FEWEST_LABELS, MOST_LABELS = 2, 10_000
"""That a classifier tells apart."""


@dataclass(frozen=True)
class Head:
    """A classifier's head, which the model's owner does not have: it is made anew, and trains.

    Attributes:
        labels: how many there are.
        seed: of its initial values.
    """

    labels: int
    seed: int = 0

    def told(self, config: "PreTrainedConfig") -> None:
        """Make a configuration one of such a classifier; names that the owner gave to labels are none of these."""
        config.id2label = {number: f"LABEL_{number}" for number in range(self.labels)}
        config.label2id = {name: number for number, name in config.id2label.items()}
        config.problem_type = "single_label_classification"
