"""Whether two runs were the same tuning, and the flags that make another run tune as one did.

Knows what reports say of settings; compares no scores. What an older report does not say is left open.
"""

import shlex
from typing import Any, Final

from isthmus.report.schema import RunReport

_FLAGS: Final = {
    "lr": "learning_rate",
    "schedule": "schedule",
    "warmup-steps": "warmup_steps",
    "clip-norm": "clip_norm",
    "batch-size": "batch_size",
    "max-length": "max_length",
}
"""Fields of the settings that say how the rows are stepped through, by flag."""

_UNSAID: Final = "learning rate, batch size and training rows"


def placing(run: RunReport) -> str:
    """The flags of `edge_client train` that say what trains and where, the cut apart."""
    settings = run.settings
    found: dict[str, Any] = {"peft": (run.peft_type or "lora").lower(), "rank": run.params.rank}
    options = settings.peft_options if settings is not None else ()
    if settings is not None:
        targets = ",".join(settings.targets) if settings.targets is not None else None
        found |= {"alpha": settings.alpha, "targets": targets, "dropout": settings.dropout or None}
    told = _joined({**found, "train": "top" if run.train == "top" else None})
    return " ".join([told, *(f"--peft-option {shlex.quote(one)}" for one in options)])


def stepping(run: RunReport) -> str:
    """The flags that say how it is trained, for as many steps as one likes."""
    found = {flag: getattr(run.settings, name, None) for flag, name in _FLAGS.items()}
    return _joined({**found, "seed": run.seed, "dtype": run.dtype})


def differences(own: RunReport, other: RunReport) -> tuple[str, ...]:
    """In which settings another run was not the same tuning, in words; not of its steps and what trained in it."""
    pairs: dict[str, tuple[Any, Any]] = {"seed": (own.seed, other.seed)}
    if None not in (own.dtype, other.dtype):
        pairs["dtype"] = (own.dtype, other.dtype)
    if own.settings is not None and other.settings is not None:
        names = (*_FLAGS.values(), "alpha", "dropout", "targets", "peft_options")
        pairs |= {name: (getattr(own.settings, name), getattr(other.settings, name)) for name in names}
    found = [
        f"{name.replace('_', ' ')} {_said(theirs)} where this one had {_said(mine)}"
        for name, (mine, theirs) in pairs.items()
        if mine != theirs
    ]
    if own.settings is not None and other.settings is not None and own.settings.data != other.settings.data:
        found.append("other training rows")
    return tuple(found)


def unlike(own: RunReport, other: RunReport) -> tuple[str, ...]:
    """All in which another run was not the same tuning, in words."""
    pairs = [
        (f"{own.steps:,}", f"{other.steps:,} steps", own.steps != other.steps),
        (f"{own.peft_type}", f"{other.peft_type}", own.peft_type != other.peft_type),
    ]
    mine, theirs = own.params.trainable, other.params.trainable
    if None not in (mine, theirs):
        pairs.append((f"{mine:,}", f"{theirs:,} trained parameters", mine != theirs))
    more = (f"{its} where this one had {this}" for this, its, differ in pairs if differ)
    return *more, *differences(own, other)


def in_words(name: str, own: RunReport, other: RunReport) -> tuple[str, ...]:
    """Sentences about `other`, which is called `name`, where it was not the same tuning or may not have been."""
    found, silent = unlike(own, other), own.settings is None or other.settings is None
    return (
        *([f"{name}, on the true span throughout, was not the same tuning: {', '.join(found)}."] if found else []),
        *([f"Whether {name} had the same {_UNSAID} is not known: an older report does not say."] if silent else []),
    )


def _joined(flags: dict[str, Any]) -> str:
    return " ".join(f"--{flag} {shlex.quote(str(value))}" for flag, value in flags.items() if value is not None)


def _said(value: Any) -> str:
    if value is None or value == ():
        return "the usual"
    return ",".join(value) if isinstance(value, tuple) else f"{value}"
