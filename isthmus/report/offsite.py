"""From the untouched model to tuning on the true span throughout: what makes each row, and what the row cost.

Knows reports and evaluations that others have read; says nothing of them in words, draws nothing and reads no file.
Method: G. Xiao, J. Lin and S. Han, Offsite-Tuning: Transfer Learning without Full Model, arXiv 2302.04870 (2023).
"""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from isthmus.ledger.record import PHASES
from isthmus.report.evaluated import Evaluated
from isthmus.report.schema import Offsite, RunReport, Score

_NEW: Final = "--data ROWS --eval-data HELD-OUT --out NEW"


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


@dataclass(frozen=True)
class Row:
    """A score, what it took, and the runs that it is from; a row without a score has the command that would make it."""

    label: str
    score: Score | None = None
    spent: Spent = Spent()
    runs: tuple[str, ...] = ()
    command: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of one run on an emulator, all scored on the same rows of data.

    Attributes:
        carried_on: plugged in plus N true steps, one row for each such run, the fewest steps first.
        steps_on: of each of those.
        throughout: tuned on the true span throughout; `reference` is that run.
    """

    name: str
    run: RunReport
    emulator: Offsite
    untouched: Row
    before: Row
    tuned: Row
    plugged_in: Row
    carried_on: tuple[Row, ...]
    steps_on: tuple[int, ...]
    throughout: Row
    reference: RunReport | None

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them, in the order in which they are shown."""
        return (self.untouched, self.before, self.tuned, self.plugged_in, *self.carried_on, self.throughout)

    @property
    def missing(self) -> dict[str, list[str]]:
        """Of rows without a score the labels, by the command that would make them."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.command is not None:
                found.setdefault(row.command, []).append(row.label)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Exact figures, as JSON has them."""
        rows = [
            {
                "row": row.label,
                "runs": list(row.runs),
                "score": row.score.model_dump(mode="json") if row.score is not None else None,
                **vars(row.spent),
                "command": row.command,
            }
            for row in self.rows
        ]
        return {"emulator": self.emulator.model_dump(mode="json"), "rows": rows}


def tables(reports: Mapping[str, RunReport], evaluations: Mapping[str, tuple[Evaluated, ...]]) -> tuple[Table, ...]:
    """A table for each of the named runs that was tuned on an emulator, from it, its evaluations and the other runs.

    Args:
        reports: runs by name; those beside an emulator's count where model, cut and held-out rows are the same.
        evaluations: of runs that have any, oldest first, by the same names.
    """
    return tuple(
        _Sources(name, run, reports, evaluations.get(name, ())).table(run.offsite)
        for name, run in reports.items()
        if run.offsite is not None
    )


@dataclass(frozen=True)
class _Sources:
    """A run on an emulator, and where the rows that it did not make itself are looked for."""

    name: str
    run: RunReport
    reports: Mapping[str, RunReport]
    evaluations: tuple[Evaluated, ...]

    def table(self, emulator: Offsite) -> Table:
        on, reference = self._carried_on(), self._reference()
        scores, own = self.run.eval, (self.name,)
        again = f"edge_client train --resume --out {shlex.quote(self.name)}"
        return Table(
            name=self.name,
            run=self.run,
            emulator=emulator,
            untouched=self._untouched(),
            before=self._row(self._before_label(), scores.before, Spent(), own, again),
            tuned=self._row("tuned on the emulator", scores.after, _spent(self.run), own, again),
            plugged_in=self._plugged_in(),
            carried_on=tuple(self._carried_on_row(name, on[name]) for name in on) or (self._not_carried_on(),),
            steps_on=tuple(run.steps for run in on.values()),
            throughout=self._throughout(reference),
            reference=self.reports[reference] if reference is not None else None,
        )

    def _before_label(self) -> str:
        return "untouched emulator" if self.run.begun_from is None else "emulator, before"

    def _untouched(self) -> Row:
        label, evaluated = "untouched model", self._evaluated(untouched=True)
        if evaluated is not None:
            return Row(label, evaluated.score, runs=(self.name,))
        found = [name for name, run in self._on_the_true_span().items() if run.eval.before.loss is not None]
        score = self.reports[found[0]].eval.before if found else None
        return self._row(label, score, Spent(), tuple(found[:1]), f"{self._evaluate()} --untouched")

    def _plugged_in(self) -> Row:
        label, evaluated = "plugged in", self._evaluated(untouched=False)
        if evaluated is not None:
            crossed = evaluated.up_bytes + evaluated.down_bytes
            return Row(label, evaluated.score, _spent(self.run, crossed=crossed), (self.name,))
        found = [name for name, run in self._from_here().items() if run.eval.before.loss is not None]
        score = self.reports[found[0]].eval.before if found else None
        # which bytes of that run were for this score is not known
        spent = _spent(self.run, crossed=None)
        return self._row(label, score, spent, (self.name, *found[:1]), self._evaluate())

    def _carried_on(self) -> dict[str, RunReport]:
        done = {name: run for name, run in self._from_here().items() if run.eval.after.loss is not None}
        return dict(sorted(done.items(), key=lambda item: item[1].steps))

    def _carried_on_row(self, name: str, run: RunReport) -> Row:
        label = f"plus {run.steps:,} true step{'' if run.steps == 1 else 's'}"
        return Row(label, run.eval.after, _spent(self.run, run), (self.name, name))

    def _not_carried_on(self) -> Row:
        command = f"edge_client train --method split --from {shlex.quote(self.name)} --steps N {_NEW} {self._server}"
        return self._row("plus N true steps", None, Spent(), (), command)

    def _throughout(self, name: str | None) -> Row:
        run, own = self.reports[name] if name is not None else None, self.run
        what = f"--peft {(own.peft_type or 'lora').lower()}" + (" --train top" if own.train == "top" else "")
        where = f"--cut {own.cut} {self._server}"
        command = f"edge_client train --method split {where} {what} --steps {own.steps} {_NEW}"
        score, spent = (run.eval.after, _spent(run)) if run is not None else (None, Spent())
        return self._row("true span throughout", score, spent, (name,) if name is not None else (), command)

    def _reference(self) -> str | None:
        """Of the runs on the true span throughout the likest to this one, and not the best."""
        own = self.run
        found = [(name, run) for name, run in self._on_the_true_span().items() if run.eval.after.loss is not None]
        likest = min(
            found,
            key=lambda item: (
                item[1].peft_type != own.peft_type,
                item[1].params.trainable != own.params.trainable,
                abs(item[1].steps - own.steps),
            ),
            default=None,
        )
        return likest[0] if likest is not None else None

    def _evaluated(self, *, untouched: bool) -> Evaluated | None:
        """The latest evaluation on the true span, on the rows that the run itself was scored on."""
        fitting = [
            one
            for one in self.evaluations
            if one.span != "emulated" and one.untouched == untouched and one.data == self.run.eval_data
        ]
        return fitting[-1] if fitting else None

    def _from_here(self) -> dict[str, RunReport]:
        """Runs on the true span that began with this run's adapter."""
        adapter = self.run.adapter
        return {
            name: run
            for name, run in self._comparable().items()
            if adapter is not None and run.begun_from is not None and run.begun_from.adapter == adapter
        }

    def _on_the_true_span(self) -> dict[str, RunReport]:
        """Runs that never met an emulator."""
        return {name: run for name, run in self._comparable().items() if run.begun_from is None}

    def _comparable(self) -> dict[str, RunReport]:
        def facts(run: RunReport) -> tuple[str | None, ...]:
            return run.model_digest, run.cut, run.eval_data

        return {
            name: run
            for name, run in self.reports.items()
            if run.method in ("split", "local") and None not in facts(run) and facts(run) == facts(self.run)
        }

    def _row(self, label: str, score: Score | None, spent: Spent, runs: tuple[str, ...], command: str) -> Row:
        if score is not None and score.loss is not None:
            return Row(label, score, spent, runs)
        if self.run.eval_data is None:  # nothing can be compared with a run that was not scored
            emulator = self._server if self.run.server else "--emulator DIR"
            command = f"edge_client train --method offsite {_NEW} {emulator}"
        return Row(label, command=command)

    def _evaluate(self) -> str:
        there = "" if self.run.server else f" {self._server}"
        return f"edge_client evaluate --run {shlex.quote(self.name)} --data HELD-OUT --span remote{there}"

    @property
    def _server(self) -> str:
        return f"--server {self.run.server or 'HOST:PORT'}"


def _spent(*runs: RunReport, crossed: int | None = 0) -> Spent:
    """What runs spent together, and beside them `crossed` bytes; None: nobody knows how many."""
    edges = [run.cost.edge for run in runs]
    return Spent(
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
