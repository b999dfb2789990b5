"""The forward-only rows against each other: differences on the same held-out rows, and the targets.

Knows rows that are measured and where their runs are kept; measures nothing.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.forward_figures import FIRST, LATER, VALIDATION
from benchmarks.forward_rows import REFERENCE, VARIANTS, Variant
from benchmarks.results import Figure, Outcome, Target
from benchmarks.scores import ACCURACY, LOSS, change_of, changes_of, differences
from benchmarks.series import Measured

LEAST_CHANGE = -1.5
MOST_SHARE, MOST_SHARE_INT8 = 0.51, 0.26


def compare(measured: Measured, runs: Mapping[str, Path]) -> Outcome:
    """Each row's differences from the reference, and the targets for which the rows are there.

    Args:
        measured: what has been measured.
        runs: their run directories.
    """
    found: dict[str, Figure] = {}
    if REFERENCE.name not in measured:
        return Outcome(found, ())
    for name in measured:
        if name != REFERENCE.name:
            found |= changes_of(name, differences(runs[name], runs[REFERENCE.name]))
    if len(measured) < len(VARIANTS):
        return Outcome(found, ())
    tops = [each for each in VARIANTS if each.top]
    targets = [*_accuracy(tops, measured, found), *_shares(tops, measured), *_later(measured)]
    return Outcome(found, tuple(targets))


def _accuracy(tops: list[Variant], measured: Measured, found: Mapping[str, Figure]) -> list[Target]:
    exact = [each.name for each in tops if each.codec == REFERENCE.codec]
    if not exact:
        return []
    best = max(exact, key=lambda name: measured[name][VALIDATION].value)
    change, loss = found[change_of(best, ACCURACY)], found[change_of(best, LOSS)]
    low = change.value if change.low is None else change.low
    met = low >= LEAST_CHANGE
    below = change.value - low
    reason = (
        f"the difference is {change.value:.2f} points and its interval reaches {below:.2f} further down; loss {loss}"
    )
    text = (
        f"accuracy of the top cut that is best on the validation rows, less `{REFERENCE.name}`'s: at least "
        f"{LEAST_CHANGE} points at the lower bound"
    )
    return [Target(text, f"{best}: {change}", met, None if met else reason)]


def _shares(tops: list[Variant], measured: Measured) -> list[Target]:
    references = {each.codec: each.name for each in VARIANTS if each.cut == REFERENCE.cut and each.name in measured}
    equal = {top.name: _share(measured, top.name, references[top.codec]) for top in tops if top.codec in references}
    coarse = {top.name: _share(measured, top.name, REFERENCE.name) for top in tops if top.codec == "int8"}
    texts = (
        (f"tensor bytes of epoch 1 at most {MOST_SHARE:.0%} of `split`'s at equal codec", equal, MOST_SHARE),
        (f"with int8 at most {MOST_SHARE_INT8:.0%} of `{REFERENCE.name}`'s", coarse, MOST_SHARE_INT8),
    )
    return [_most(text, shares, limit) for text, shares, limit in texts if shares]


def _share(measured: Measured, name: str, reference: str) -> float:
    return measured[name][FIRST].value / measured[reference][FIRST].value


def _most(text: str, shares: Mapping[str, float], limit: float) -> Target:
    worst = max(shares, key=lambda name: shares[name])
    met = shares[worst] <= limit
    reason = f"{sum(share > limit for share in shares.values())} of {len(shares)} top rows send more"
    return Target(text, f"{100 * shares[worst]:.2f} % at most ({worst})", met, None if met else reason)


def _later(measured: Measured) -> list[Target]:
    later = {each.name: measured[each.name][LATER] for each in VARIANTS if each.forward_only and each.name in measured}
    if not later:
        return []
    sent = sum(figure.value for figure in later.values())
    senders = ", ".join(name for name, figure in later.items() if figure.value)
    reached = f"{sent:,.0f} bytes in {len(later)} runs"
    reason = f"outputs were asked for again by {senders}" if senders else None
    return [Target("no tensor bytes in later epochs, `top` and `side`", reached, not sent, reason)]
