"""What the edge spent on tuning, in one run or in several that followed each other.

Knows reports; draws nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from isthmus.ledger.record import PHASES
from isthmus.report.schema import RunReport


@dataclass(frozen=True)
class Spent:
    """What the edge spent on tuning until a row was there; None: nothing was tuned, or it was not measured apart.

    Attributes:
        wire_bytes: both ways, in all phases, those of the scores after it included.
        flops: of training, both passes.
        memory_bytes, tensor_bytes: peaks of the process and of its tensors in training, the greatest of all runs.
        tokens_per_s: real tokens of training.
    """

    wire_bytes: int | None = None
    flops: int | None = None
    memory_bytes: int | None = None
    tensor_bytes: int | None = None
    tokens_per_s: float | None = None

    @classmethod
    def of(cls, *runs: RunReport, crossed: int | None = 0) -> "Spent":
        """What runs spent together, and beside them `crossed` bytes; None: nobody knows how many."""
        edges = [run.cost.edge for run in runs]
        return cls(
            wire_bytes=_sum([crossed, *(_wire_bytes(run) for run in runs)]),
            flops=_sum(figure for edge in edges for figure in (edge.forward_flops, edge.backward_flops)),
            memory_bytes=_greatest(edge.peak_memory_bytes for edge in edges),
            tensor_bytes=_greatest(edge.peak_tensor_bytes for edge in edges),
            tokens_per_s=_tokens_per_s(runs),
        )


def _wire_bytes(run: RunReport) -> int:
    phases = [getattr(run.cost.wire.by_phase, phase) for phase in PHASES]
    return sum(phase.up_bytes + phase.down_bytes for phase in phases)


def _tokens_per_s(runs: Iterable[RunReport]) -> float | None:
    rates = [(run.tokens.real, run.throughput.train_tokens_per_s) for run in runs]
    if len(rates) == 1:
        return rates[0][1]
    seconds = [tokens / rate for tokens, rate in rates if rate]
    return sum(tokens for tokens, _ in rates) / sum(seconds) if len(seconds) == len(rates) else None


def _sum(figures: Iterable[int | None]) -> int | None:
    known = list(figures)
    return None if None in known else sum(figure for figure in known if figure is not None)


def _greatest(figures: Iterable[int | None]) -> int | None:
    known = list(figures)
    return None if None in known else max(figure for figure in known if figure is not None)
