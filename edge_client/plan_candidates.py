"""The plans that `--fit` chooses from, the better first: methods, cuts, ranks, codecs, shares of ports, batches.

Knows an order of preference, which is a choice and no measured accuracy (docs/planning.md); what was told stands in
place of what would be tried.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Final

from edge_client.config import TrainConfig
from edge_client.plan_settings import PlanSettings

KINDS: Final[tuple[Mapping[str, Any], ...]] = (
    {"method": "dlora", "kr_active": None},
    {"method": "dlora", "kr_active": 0.5},
    {"method": "dlora", "kr_active": 0.25},
    {"method": "dlora", "kr_active": 0.125},
    {"method": "split", "train": "both"},
    {"method": "split", "train": "top"},
    {"method": "side"},
    {"method": "offsite"},
)
"""What trains and against what: adapters in all blocks, in both ends, above the span, beside it; at last both ends, but
against a stand-in for the span."""

CODECS: Final = ("none", "bf16", "int8")
"""What loses least first; fp16 is as large as bf16."""

BATCHES: Final = (8, 4, 1)
MICROBATCHES: Final = (1, 4)
RANKS: Final = (8, 16)
CUTS: Final = ("1:1", "2:2", "4:4")
CUTS_OF_TOP: Final = ("0:1", "0:2", "0:4")
CUTS_OF_SIDE: Final = ("0:0", "0:2")
"""Where nothing below the span trains no block needs to be there, and beside a side network none at all."""


def tiers(settings: PlanSettings, blocks: int) -> Iterator[list[TrainConfig]]:
    """Settings of runs by preference: a kind, a codec and a batch size at a time, with all its cuts and ranks.

    Args:
        settings: of the plan.
        blocks: of the model.

    Raises:
        UsageError: what was told makes no sense with any of the methods that it allows.
    """
    for kind in _kinds(settings.run):
        codecs = ("none",) if kind["method"] == "offsite" else _of(settings, "codec", CODECS)
        for codec, batch in product(codecs, _batches(settings)):
            alike = {**kind, "batch_size": batch} | ({"codec": codec} if kind["method"] != "offsite" else {})
            yield list(_within(settings, alike, blocks))


def _within(settings: PlanSettings, alike: Mapping[str, Any], blocks: int) -> Iterator[TrainConfig]:
    usual = CUTS_OF_SIDE if alike["method"] == "side" else CUTS_OF_TOP if alike.get("train") == "top" else CUTS
    cuts = [cut for cut in _of(settings, "cut", usual) if _leaves_a_span(cut, blocks)]
    parts = [count for count in _of(settings, "microbatches", MICROBATCHES) if count <= alike["batch_size"]]
    for cut, rank, count in product(cuts, _ranks(settings, alike["method"]), parts or [1]):
        strength = {} if rank is None else {"rank": rank}
        yield settings.configured({**alike, **strength, "cut": cut, "microbatches": count})


def _kinds(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The kinds that what was told leaves; a share of ports that was told stands in place of all of them."""
    kinds: list[Mapping[str, Any]] = [kind for kind in KINDS if all(_as_told(kind, run, name) for name in kind)]
    if "kr_active" in run:
        kinds = [{"method": "dlora", "kr_active": run["kr_active"]}] if run.get("method", "dlora") == "dlora" else []
    if run.get("peft", "lora") != "lora":
        kinds = [kind for kind in kinds if kind["method"] in ("split", "offsite")]
    return kinds


def _as_told(kind: Mapping[str, Any], run: Mapping[str, Any], name: str) -> bool:
    return name not in ("method", "train") or run.get(name, kind[name]) == kind[name]


def _batches(settings: PlanSettings) -> tuple[int, ...]:
    """Smaller ones only where epochs say how much is seen, for else a smaller one would just see fewer rows."""
    if "batch_size" in settings.run or "steps" in settings.run:
        return (settings.run.get("batch_size", BATCHES[0]),)
    return BATCHES


def _ranks(settings: PlanSettings, method: str) -> tuple[int | None, ...]:
    if method == "side" or settings.run.get("peft", "lora") != "lora":
        return (None,)
    return _of(settings, "rank", RANKS)


def _of(settings: PlanSettings, name: str, usual: tuple[Any, ...]) -> tuple[Any, ...]:
    return (settings.run[name],) if name in settings.run else usual


def _leaves_a_span(cut: str, blocks: int) -> bool:
    return sum(map(int, cut.split(":"))) < blocks
