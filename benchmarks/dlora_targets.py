"""The DLoRA rows against each other: differences on the same held-out rows, and the targets.

Knows rows that are measured and where their runs are kept; measures nothing.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.dlora_figures import BYTES, PORTS
from benchmarks.dlora_rows import ALL, OURS, RANDOM, SEEDS, TOP, VARIANTS
from benchmarks.results import Figure, Outcome, Target
from benchmarks.scores import ACCURACY, LOSS, change_of, changes_of, differences, mean_differences
from benchmarks.series import Measured

LEAST_SAVED = 0.8
LEAST_CHANGE = -1.0
AGAINST = (ALL, RANDOM, TOP)


def compare(measured: Measured, runs: Mapping[str, Path]) -> Outcome:
    """Each row's differences from `all` of its seed, those of `kr-1/8` over all seeds, and the targets.

    Args:
        measured: what has been measured.
        runs: their run directories.
    """
    found: dict[str, Figure] = {}
    for variant in VARIANTS:
        reference = name_of(ALL, variant.seed)
        if variant.name in measured and reference in measured and variant.name != reference:
            found |= changes_of(variant.name, differences(runs[variant.name], runs[reference]))
    for other in AGAINST:
        if measured.keys() >= {*_of_all_seeds(OURS), *_of_all_seeds(other)}:
            ours, others = ([runs[name] for name in _of_all_seeds(each)] for each in (OURS, other))
            found |= changes_of(_less(other), mean_differences(ours, others))
    return Outcome(found, tuple(_targets(measured, found)))


def name_of(configuration: str, seed: int) -> str:
    """What the row of a configuration and a seed is called."""
    return f"{configuration}:{seed}"


def _of_all_seeds(configuration: str) -> list[str]:
    return [name_of(configuration, seed) for seed in SEEDS]


def _less(other: str) -> str:
    return f"`{OURS}` less `{other}`, mean of {len(SEEDS)} seeds"


def _targets(measured: Measured, found: Mapping[str, Figure]) -> list[Target]:
    targets = []
    if measured.keys() >= {*_of_all_seeds(OURS), *_of_all_seeds(ALL)}:
        targets += [
            _saved(measured, BYTES, f"`{OURS}` saves at least {LEAST_SAVED:.0%} of the bytes of `{ALL}`, whole run"),
            _saved(
                measured,
                PORTS,
                f"`{OURS}` saves at least {LEAST_SAVED:.0%} of the FLOPs of the adapters at ports, whole run",
            ),
        ]
    for other in AGAINST:
        change = found.get(change_of(_less(other), ACCURACY))
        if change is not None:
            targets.append(_change(other, change, found[change_of(_less(other), LOSS)]))
    return targets


def _saved(measured: Measured, figure: str, text: str) -> Target:
    shares = [
        1 - measured[ours][figure].value / measured[whole][figure].value
        for ours, whole in zip(_of_all_seeds(OURS), _of_all_seeds(ALL), strict=True)
    ]
    least = min(shares)
    met = least >= LEAST_SAVED
    reason = f"each seed: {', '.join(f'{share:.1%}' for share in shares)}"
    return Target(text, f"{least:.1%} in the seed that saves least", met, None if met else reason)


def _change(other: str, change: Figure, loss: Figure) -> Target:
    """Against `all` it may lose a little; against other ways to choose it must gain."""
    low = change.value if change.low is None else change.low
    met = low >= LEAST_CHANGE if other == ALL else low > 0
    wanted = f"at least {LEAST_CHANGE:g} points" if other == ALL else "above 0"
    text = f"accuracy, {_less(other)}: {wanted} at the lower bound"
    reason = (
        f"the difference is {change.value:.2f} points and its interval reaches {change.value - low:.2f} further down; "
        f"loss {loss}"
    )
    return Target(text, str(change), met, None if met else reason)
