"""The plans that `--fit` chooses from, the better first: methods, cuts, ranks, codecs, shares of ports, batches.

Knows an order of preference, which is a choice and no measured accuracy (docs/planning.md); what was told stands in
place of what would be tried.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Final

from edge_client.config import TrainConfig
from edge_client.plan_settings import TAKEN, PlanSettings
from isthmus.errors import UsageError

KINDS: Final[tuple[Mapping[str, Any], ...]] = (
    {"method": "dlora", "kr_active": None},
    {"method": "dlora", "kr_active": 0.5},
    {"method": "dlora", "kr_active": 0.25},
    {"method": "dlora", "kr_active": 0.125},
    {"method": "dlora", "exchange": "core", "kr_active": None},
    {"method": "dlora", "exchange": "parameters"},
    {"method": "split", "train": "both"},
    {"method": "split", "train": "top"},
    {"method": "side"},
    {"method": "offsite"},
)
"""What trains and against what: adapters in all blocks, which answer or whose values are sent, in both ends, above the
span, beside it; at last both ends, but against a stand-in for the span."""

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
    misfits: list[UsageError] = []
    found = False
    for kind in _kinds(settings.run):
        crosses = "codec" in TAKEN[kind["method"]]
        codecs = _of(settings, "codec", CODECS) if crosses else ("none",)
        for codec, batch in product(codecs, _batches(settings)):
            alike = {**kind, "batch_size": batch} | ({"codec": codec} if crosses else {})
            configs = list(_within(settings, alike, blocks, misfits))
            found = found or bool(configs)
            yield configs
    if misfits and not found:
        raise misfits[0]


def _within(
    settings: PlanSettings, alike: Mapping[str, Any], blocks: int, misfits: list[UsageError]
) -> Iterator[TrainConfig]:
    """All cuts, ranks and microbatches of what is alike; what they make no sense with is put into `misfits`."""
    usual = CUTS_OF_SIDE if alike["method"] == "side" else CUTS_OF_TOP if alike.get("train") == "top" else CUTS
    cuts = [cut for cut in _of(settings, "cut", usual) if _leaves_a_span(cut, blocks)]
    parts = _of(settings, "microbatches", tuple(count for count in MICROBATCHES if count <= alike["batch_size"]))
    for cut, rank, count in product(cuts, _ranks(settings, alike["method"]), parts):
        strength = {} if rank is None else {"rank": rank}
        try:
            yield settings.configured({**alike, **strength, "cut": cut, "microbatches": count})
        except UsageError as error:
            misfits.append(error)


def _kinds(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The kinds that take all that was told; a share of ports that was told stands in place of all of them."""
    kinds: list[Mapping[str, Any]] = list(KINDS)
    if "kr_active" in run:
        exchange = {"exchange": run["exchange"]} if run.get("exchange", "activations") != "activations" else {}
        kinds = [{"method": "dlora", "kr_active": run["kr_active"], **exchange}]
    return [kind for kind in kinds if all(_takes(kind, name, value) for name, value in run.items())]


def _takes(kind: Mapping[str, Any], name: str, value: object) -> bool:
    if name.startswith("kr_") and kind.get("kr_active") is None:
        return False
    if name in ("exchange", "init") and kind["method"] == "dlora":
        wanted = value if name == "exchange" else "core"
        return bool(wanted == kind.get("exchange", "activations"))
    return name in TAKEN[kind["method"]] and (name not in ("method", "train") or kind.get(name, value) == value)


def _batches(settings: PlanSettings) -> tuple[int, ...]:
    """Smaller ones only where epochs say how much is seen, for else a smaller one would just see fewer rows."""
    if "batch_size" in settings.run or "steps" in settings.run:
        return (settings.run.get("batch_size", BATCHES[0]),)
    return BATCHES


def _ranks(settings: PlanSettings, method: str) -> tuple[int | None, ...]:
    if "rank" not in TAKEN[method] or settings.run.get("peft", "lora") != "lora":
        return (None,)
    return _of(settings, "rank", RANKS)


def _of(settings: PlanSettings, name: str, usual: tuple[Any, ...]) -> tuple[Any, ...]:
    return (settings.run[name],) if name in settings.run else usual


def _leaves_a_span(cut: str, blocks: int) -> bool:
    return sum(map(int, cut.split(":"))) < blocks
