"""What the edge spent on tuning, in one run or in several that followed each other.

Knows reports; draws nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from isthmus.ledger.record import PHASES, Phase
from isthmus.report.schema import RunReport


@dataclass(frozen=True)
class Spent:
    """What the edge spent on tuning until a row was there; None: nothing was tuned, or it was not measured apart.

    Attributes:
        wire_bytes: both ways, in all phases, those of the scores after it included.
        fetch_bytes: of them, of bundles.
        here_bytes: of bundles that were needed and did not cross, since they were here already; None also where their
            size is not known.
        train_bytes, score_bytes, look_bytes: of `wire_bytes`, in training, for scores, and for looks at the true span
            while an emulator was tuned on.
        flops: of training, both passes.
        memory_bytes, tensor_bytes: peaks of the process and of its tensors in training, the greatest of all runs.
        tokens_per_s: real tokens of training.
    """

    wire_bytes: int | None = None
    fetch_bytes: int | None = None
    here_bytes: int | None = None
    train_bytes: int | None = None
    score_bytes: int | None = None
    look_bytes: int | None = None
    flops: int | None = None
    memory_bytes: int | None = None
    tensor_bytes: int | None = None
    tokens_per_s: float | None = None

    @classmethod
    def of(cls, *runs: RunReport, scored: int | None = 0, fetched: int = 0) -> "Spent":
        """What runs spent together, and for a score after them.

        Args:
            runs: in any order.
            scored: bytes that crossed for the score; None: nobody knows how many.
            fetched: bytes of what was fetched for it.
        """
        edges = [run.cost.edge for run in runs]
        return cls(
            wire_bytes=_sum([scored, fetched, *(crossed(run, *PHASES) for run in runs)]),
            fetch_bytes=_sum([fetched, *(crossed(run, "fetch") for run in runs)]),
            here_bytes=_sum(map(_here, runs)),
            train_bytes=_sum(crossed(run, "train") for run in runs),
            score_bytes=_sum([scored, *(crossed(run, "eval") - look_bytes(run) for run in runs)]),
            look_bytes=_sum(map(look_bytes, runs)),
            flops=_sum(figure for edge in edges for figure in (edge.forward_flops, edge.backward_flops)),
            memory_bytes=_greatest(edge.peak_memory_bytes for edge in edges),
            tensor_bytes=_greatest(edge.peak_tensor_bytes for edge in edges),
            tokens_per_s=_tokens_per_s(runs),
        )


def crossed(run: RunReport, *phases: Phase) -> int:
    """Bytes both ways in these phases."""
    found = [getattr(run.cost.wire.by_phase, phase) for phase in phases]
    return sum(phase.up_bytes + phase.down_bytes for phase in found)


def look_bytes(run: RunReport) -> int:
    """Bytes both ways of looks at the true span: a run on an emulator scores its own rows without the wire."""
    return crossed(run, "eval") if run.offsite is not None else 0


def _here(run: RunReport) -> int | None:
    if run.method == "local" or crossed(run, "fetch"):
        return 0
    return run.offsite.bundle_bytes if run.offsite is not None else None  # how much ends are, no report says


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
