"""From a ledger's phases to stages, each with all that it cost.

Knows the ledger's figures and the report's fields; measures nothing and formats nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from isthmus.ledger.figures import EVERY_PHASE, Phase
from isthmus.ledger.record import Ledger
from isthmus.ledger.told import Told
from isthmus.report.fields.stage import Stage
from isthmus.report.units import scaled, size


def stage_of(ledger: Ledger, phase: Phase, **known: Any) -> Stage | None:
    """What a phase cost, and what else is `known` of it by the names of `Stage`; None where it spent nothing."""
    spent: dict[str, Any] = {**ledger.totals(phase), **ledger.peaks(phase)}
    if not spent:
        return None
    return Stage(stage=phase, **{name: spent[name] for name in spent if name in Stage.model_fields}, **known)


def stages_of(ledger: Ledger, known: Mapping[Phase, Mapping[str, Any]]) -> tuple[Stage, ...]:
    """Every phase that spent something, in the order of a run, with what else is known of it."""
    found = (stage_of(ledger, phase, **known.get(phase, {})) for phase in EVERY_PHASE)
    return tuple(stage for stage in found if stage is not None)


def stages_told(told: Told) -> tuple[Stage, ...]:
    """What whoever did them says of them; what came of them was stored by the first."""
    seconds = ("cloud_forward_s", "cloud_backward_s", "cloud_update_s")
    known: dict[Phase, dict[str, Any]] = {}
    for number, phase in enumerate(phase for phase in EVERY_PHASE if told.ledger.totals(phase)):
        spent = told.ledger.totals(phase)
        known[phase] = {"seconds": float(sum(spent.get(name, 0) for name in seconds))}
        known[phase] |= {"stored_bytes": told.stored_bytes} if not number else {}
        known[phase] |= {"steps": told.steps[phase]} if told.steps.get(phase) else {}
    return stages_of(told.ledger, known)


def in_words(told: Told) -> Iterator[tuple[str, str]]:
    """For a terminal: of each stage that was told its name, and what it took."""
    for stage in stages_told(told):
        flops = scaled((stage.cloud_forward_flops or 0) + (stage.cloud_backward_flops or 0), "FLOP")
        memory = f"tensors {size(stage.cloud_peak_tensor_bytes)}, process {size(stage.cloud_peak_memory_bytes)}"
        yield stage.stage, f"took {stage.seconds or 0:,.2f} s, {flops}; {memory}"
