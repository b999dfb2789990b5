"""What stands in a run's report, section by section, as people read it: rows of plain words, and a cell for each run.

Knows the report's fields, their units and their plain names; computes no figure that is not a ratio of two others, and
draws nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from isthmus.ledger.record import PHASES
from isthmus.report import ports
from isthmus.report.fields.cost import Traffic
from isthmus.report.fields.score import Score
from isthmus.report.schema import RunReport
from isthmus.report.units import NONE, scaled, size

PHASE_LABELS: Final = {
    "fetch": "Fetching",
    "train": "Training",
    "eval": "Evaluating",
    "generate": "Generating",
    "submit": "Submitting",
    "control": "Control",
}
_LOOKS: Final = "Looks at the true span"


@dataclass(frozen=True)
class Row:
    """A line: what it is of, and a cell for each run."""

    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Rows that belong together."""

    title: str
    rows: tuple[Row, ...]


def sections(reports: Sequence[RunReport]) -> list[Section]:
    """All of a report of these runs; rows that say nothing of any of them are left out."""

    def row(label: str, cell: Callable[[RunReport], str]) -> Row:
        return Row(label, tuple(cell(report) for report in reports))

    with_ports = any(report.ports for report in reports)
    watched = any(report.offsite and report.offsite.watched for report in reports)
    phases = [row(PHASE_LABELS[phase], partial(_traffic, phase)) for phase in _used(reports)]
    if watched:
        phases.append(row(_LOOKS, _look_traffic))
    if with_ports:
        phases.insert(_used(reports).index("train") + 1, row("Of it, ports", _port_traffic))
    with_choice = any(report.ports and report.ports.kill_revive for report in reports)
    return [
        Section(
            "Run",
            (
                row("Method", _method),
                row("Model", lambda r: r.model),
                row("Cut", lambda r: r.cut or NONE),
                row("Adapter", _adapter),
                *([row("Side network", _side)] if any(report.side for report in reports) else []),
                *([row("Ports", ports.number), row("Kill-and-Revive", ports.kill_revive)] if with_ports else []),
                *([row("Chosen by", ports.chosen_by)] if with_choice else []),
                *([row("Values sent to the cloud", ports.values_sent)] if with_choice else []),
                row("Ended", lambda r: r.status or NONE),
                row("Steps", lambda r: f"{r.steps:,}"),
                row("Tokens run in training", lambda r: f"{r.tokens.real:,}"),
                row("With padding", lambda r: f"{r.tokens.padded:,}"),
            ),
        ),
        Section(
            "Quality [95 % interval]",
            (
                row("Rows scored", lambda r: _count(r.eval.rows)),
                row("Accuracy before", lambda r: _accuracy(r.eval.before)),
                row("Accuracy after", lambda r: _accuracy(r.eval.after)),
                row("Change, in points", _change),
                row("Loss before", lambda r: _fixed(r.eval.before.loss, 4)),
                row("Loss after", lambda r: _fixed(r.eval.after.loss, 4)),
                row("Last training loss", lambda r: _fixed(r.final_loss, 4)),
            ),
        ),
        Section(
            "Wire, up / down",
            (
                *phases,
                row("Training, per token", _per_token),
                row("Training, overhead", _overhead),
                row("Sent again", lambda r: size(r.cost.wire.resent_bytes)),
                row("Round trips", lambda r: f"{r.cost.wire.round_trips:,}"),
                *(
                    [row("Kept rows, sent before", _cached)]
                    if any(report.cost.wire.cache for report in reports)
                    else []
                ),
                row("The two sides' counts", _agreement),
            ),
        ),
        Section(
            "Compute, training",
            (
                row("Edge forward", lambda r: _flops(r.cost.edge.forward_flops)),
                row("Edge backward", lambda r: _flops(r.cost.edge.backward_flops)),
                *([row("Edge adapters at ports", _port_flops)] if with_ports else []),
                row("Cloud forward", lambda r: _flops(r.cost.cloud.forward_flops)),
                row("Of it, run again", _recomputed),
                row("Cloud backward", lambda r: _flops(r.cost.cloud.backward_flops)),
            ),
        ),
        Section(
            "Time, training",
            (
                row("Edge forward", lambda r: _seconds(r.cost.edge.forward_s)),
                row("Edge backward", lambda r: _seconds(r.cost.edge.backward_s)),
                row("Edge waiting", lambda r: _seconds(r.cost.edge.wait_s)),
                row("Cloud forward", lambda r: _seconds(r.cost.cloud.forward_s)),
                row("Cloud backward", lambda r: _seconds(r.cost.cloud.backward_s)),
                row("Cloud queue", lambda r: _seconds(r.cost.cloud.queue_s)),
                row("In all", lambda r: _seconds(r.train_seconds)),
                *([row("Looks, not in it", _look_seconds)] if watched else []),
                row("Tokens a second", lambda r: _fixed(r.throughput.train_tokens_per_s, 1)),
            ),
        ),
        Section(
            "Memory, peak",
            (
                row("Edge tensors", lambda r: size(r.cost.edge.peak_tensor_bytes)),
                row("Edge process", lambda r: size(r.cost.edge.peak_memory_bytes)),
                row("Cloud tensors", lambda r: size(r.cost.cloud.peak_tensor_bytes)),
                row("Cloud process, all tenants", lambda r: size(r.cost.cloud.peak_memory_bytes)),
            ),
        ),
        Section(
            "Parameters",
            (
                row("Trained", lambda r: _count(r.params.trainable)),
                row("Of them, in the head", lambda r: _count(r.params.head)),
                row("Changed, once merged", lambda r: _count(r.params.changed)),
                row("Rank", lambda r: _count(r.params.rank)),
                row("Stored", lambda r: size(r.params.stored_bytes)),
            ),
        ),
    ]


def _method(report: RunReport) -> str:
    name = ", ".join(filter(None, (report.method, report.exchange, "top" if report.train == "top" else None)))
    forward_only = report.method == "side" or (report.method == "split" and report.train == "top")
    return f"{name}: no gradient crosses" if forward_only else name


def _adapter(report: RunReport) -> str:
    if report.peft_type is None and report.adapter_format is None:
        return NONE
    written = {"peft": "PEFT format", "isthmus": "Isthmus format", None: "not saved"}[report.adapter_format]
    return f"{report.peft_type}, {written}" if report.peft_type else written


def _side(report: RunReport) -> str:
    side = report.side
    return f"1/{side.reduction} wide, {side.taps} taps of {side.tap_width:,}" if side else NONE


def _accuracy(score: Score) -> str:
    if score.accuracy is None:
        return NONE
    low_high = score.accuracy_interval
    interval = f"[{100 * low_high[0]:.1f}, {100 * low_high[1]:.1f}]  " if low_high else ""
    return f"{interval}{100 * score.accuracy:.1f} %"


def _change(report: RunReport) -> str:
    before, after, paired = report.eval.before.accuracy, report.eval.after.accuracy, report.eval.paired
    if before is None or after is None:
        return NONE
    interval = f"[{100 * paired[0]:+.1f}, {100 * paired[1]:+.1f}]  " if paired else ""
    return f"{interval}{100 * (after - before):+.1f}"


def _used(reports: Sequence[RunReport]) -> list[str]:
    """Phases in which any run sent anything, and training."""
    traffic = {phase: [_of_phase(phase, report) for report in reports] for phase in PHASES}
    return [phase for phase in PHASES if phase == "train" or any(t.up_bytes or t.down_bytes for t in traffic[phase])]


def _of_phase(phase: str, report: RunReport) -> Traffic:
    """What crossed, looks at the true span apart: nothing else crosses to evaluate a run on an emulator."""
    if phase == "eval" and report.offsite is not None:
        return Traffic(up_bytes=0, down_bytes=0)
    found: Traffic = getattr(report.cost.wire.by_phase, phase)
    return found


def _traffic(phase: str, report: RunReport) -> str:
    return _both_ways(_of_phase(phase, report))


def _look_traffic(report: RunReport) -> str:
    return _both_ways(report.cost.wire.by_phase.eval) if report.offsite is not None else NONE


def _look_seconds(report: RunReport) -> str:
    return _seconds(report.offsite.watched_seconds if report.offsite is not None else None)


def _both_ways(crossed: Traffic) -> str:
    return f"{size(crossed.up_bytes)} / {size(crossed.down_bytes):>9}"


def _port_traffic(report: RunReport) -> str:
    if report.ports is None:
        return NONE
    blocks = report.ports.blocks
    return f"{size(sum(b.up_bytes for b in blocks))} / {size(sum(b.down_bytes for b in blocks)):>9}"


def _port_flops(report: RunReport) -> str:
    if report.ports is None:
        return NONE
    return _flops(sum(port.edge_forward_flops + port.edge_backward_flops for port in report.ports.ports))


def _per_token(report: RunReport) -> str:
    if not report.tokens.real:
        return NONE
    wire = report.cost.wire
    return f"{size(wire.up_bytes / report.tokens.real)} / {size(wire.down_bytes / report.tokens.real):>9}"


def _overhead(report: RunReport) -> str:
    wire = report.cost.wire
    crossed = wire.up_bytes + wire.down_bytes
    return f"{100 * wire.overhead_bytes / crossed:.2f} %" if crossed else NONE


def _cached(report: RunReport) -> str:
    cache = report.cost.wire.cache
    if cache is None:
        return NONE
    cached = cache.train.cached_rows + cache.eval.cached_rows
    rows = cached + cache.train.fetched_rows + cache.eval.fetched_rows
    return f"{cached:,} of {rows:,} ({100 * cached / rows:.0f} %)" if rows else NONE


def _agreement(report: RunReport) -> str:
    agreement = report.agreement
    if agreement is None:
        return "not checked"
    unchecked = f", {agreement.unchecked_streams} unchecked" if agreement.unchecked_streams else ""
    if agreement.equal:
        return f"agree{unchecked}"
    edge, cloud = agreement.edge, agreement.cloud
    apart = abs(edge.sent_bytes - cloud.received_bytes) + abs(edge.received_bytes - cloud.sent_bytes)
    return f"differ by {apart:,} B{unchecked}"


def _recomputed(report: RunReport) -> str:
    cloud = report.cost.cloud
    times = f"{cloud.recomputed_calls:,} x,  " if cloud.recomputed_calls else ""
    return f"{times}{_flops(cloud.recompute_flops)}"


def _count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _fixed(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:,.2f} s"


def _flops(value: float | None) -> str:
    return scaled(value, "FLOP")
