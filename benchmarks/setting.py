"""What docs/scaling.md assumes: every number that is neither of the model nor measured, and where it is from.

Knows values, their units and what they mean; computes nothing of models and methods.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from benchmarks.shapes import BFLOAT16


def _given(value: float, said: str, unit: str = "", scale: float = 1) -> Any:
    return field(default=value, metadata={"said": said, "unit": unit, "scale": scale})


@dataclass(frozen=True)
class Setting:
    """What is assumed, in seconds, bytes and FLOP/s; what each means, and the unit it is shown in, stand beside it."""

    rows: float = _given(8, "rows of a step")
    tokens: float = _given(256, "real tokens of a row")
    loss_share: float = _given(0.25, "of the tokens, those that carry loss: a completion after its prompt")
    steps_per_hour: float = _given(60, "steps an hour that an edge wants, day and night")
    epochs: float = _given(3, "epochs; what is cached crosses in the first")
    link: float = _given(100e6 / 8, "an edge's line each way, as in benchmarks.md", "Mbit/s", 1e6 / 8)
    delay: float = _given(0.05, "a round trip, as in benchmarks.md", "ms", 1e-3)
    edge: float = _given(1e12, "what an edge reaches: a laptop's GPU; devices.md has smaller ones", "TFLOP/s", 1e12)
    gpus: int = _given(4, "H100 SXM in a replica")
    peak: float = _given(989e12, "one of them in bfloat16, dense (NVIDIA's data sheet)", "TFLOP/s", 1e12)
    utilisation: float = _given(0.4, "of that, what is reached: not measured")
    memory: float = _given(80e9, "its memory (the same)", "GB", 1e9)
    usable: float = _given(0.9, "of that, what weights and activations may take: not measured")
    bandwidth: float = _given(3.35e12, "what it reads of its memory (the same)", "TB/s", 1e12)
    weight_bytes: float = _given(BFLOAT16, "a weight of the span", "bytes")
    value_bytes: float = _given(BFLOAT16, "a value that crosses", "bytes")

    @property
    def step_tokens(self) -> float:
        """Of one edge."""
        return self.rows * self.tokens

    @property
    def computing(self) -> float:
        """FLOP/s that a replica reaches."""
        return self.gpus * self.peak * self.utilisation


def shown() -> list[list[str]]:
    """Each number's name, its value in a unit that can be read, and what it is."""
    rows = []
    for one in fields(Setting):
        value = f"{one.default / one.metadata['scale']:,g} {one.metadata['unit']}".strip()
        rows.append([f"`{one.name}`", value, one.metadata["said"]])
    return rows
