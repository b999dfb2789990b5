"""From the untouched model to tuning on the true span throughout: what makes each row, and what the row cost.

Knows reports, evaluations and figures of rows that others have read; says nothing of them in words, draws nothing and
reads no file.
Method: G. Xiao, J. Lin and S. Han, Offsite-Tuning: Transfer Learning without Full Model, arXiv 2302.04870 (2023).
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from isthmus.report.evaluated import Kept, Line, PerRow
from isthmus.report.fields.offsite import Offsite
from isthmus.report.fields.score import Score
from isthmus.report.likeness import differences, placing, stepping
from isthmus.report.schema import RunReport
from isthmus.report.spent import Spent

_ROWS: Final = "--data ROWS --eval-data HELD-OUT"
_AGAIN: Final = "SCORED"
"""A run that would be the same tuning, and scored on held-out rows."""


@dataclass(frozen=True)
class Row:
    """A score, what it took, and the runs that it is from; a row without a score has the command that would make it.

    `per_row` are the figures of each row of data that was scored; None: they are not at hand.
    """

    label: str
    score: Score | None = None
    per_row: PerRow | None = None
    spent: Spent = field(default_factory=Spent)
    runs: tuple[str, ...] = ()
    command: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of one run on an emulator, all scored on the same rows of data.

    Attributes:
        carried_on: plugged in plus N true steps, one row for each such run, the fewest steps first.
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
    throughout: Row
    reference: RunReport | None

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them, in the order in which they are shown."""
        return (self.untouched, self.before, self.tuned, self.plugged_in, *self.carried_on, self.throughout)

    @property
    def missing(self) -> dict[str, list[str]]:
        """Of rows without a score the labels, by the command that would make them; the run's own come first."""
        own, others = (self.before, self.tuned), (self.untouched, self.plugged_in, *self.carried_on, self.throughout)
        found: dict[str, list[str]] = {}
        for row in (*own, *others):
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


def tables(reports: Mapping[str, RunReport], kept: Mapping[str, Kept]) -> tuple[Table, ...]:
    """A table for each of the named runs that was tuned on an emulator, from it, its evaluations and the other runs.

    Args:
        reports: runs by name; those beside an emulator's count where model, cut and held-out rows are the same.
        kept: what their directories have beside the reports, by the same names.
    """
    return tuple(
        _Sources(name, run, reports, kept).table(run.offsite)
        for name, run in reports.items()
        if run.offsite is not None
    )


class _Scored(NamedTuple):
    score: Score
    per_row: PerRow | None


@dataclass(frozen=True)
class _Sources:
    """A run on an emulator, and where the rows that it did not make itself are looked for."""

    name: str
    run: RunReport
    reports: Mapping[str, RunReport]
    kept: Mapping[str, Kept]

    def table(self, emulator: Offsite) -> Table:
        on, reference = self._carried_on(), self._reference()
        before, after = self._scored(self.name, "before"), self._scored(self.name, "after")
        own, again = (self.name,), self._again()
        return Table(
            name=self.name,
            run=self.run,
            emulator=emulator,
            untouched=self._untouched(),
            before=self._row(self._before_label(), before, Spent(), own, again),
            tuned=self._row("tuned on the emulator", after, Spent.of(self.run), own, again),
            plugged_in=self._plugged_in(),
            carried_on=tuple(self._carried_on_row(name, on[name]) for name in on) or (self._not_carried_on(),),
            throughout=self._throughout(reference),
            reference=self.reports[reference] if reference is not None else None,
        )

    def _before_label(self) -> str:
        return "untouched emulator" if self.run.begun_from is None else "emulator, before"

    def _untouched(self) -> Row:
        label, command = "untouched model", f"{self._evaluate()} --untouched"
        evaluated = self._evaluated(None)
        if evaluated is not None:
            return Row(label, evaluated.score, evaluated.per_row, runs=(self.name,))
        found = [name for name, run in self._on_the_true_span().items() if run.eval.before.loss is not None]
        return self._row(label, self._scored(found[0], "before") if found else None, Spent(), tuple(found[:1]), command)

    def _plugged_in(self) -> Row:
        label, adapter = "plugged in", self.run.adapter
        evaluated = self._evaluated(adapter) if adapter is not None else None
        if evaluated is not None:
            crossed, fetched = evaluated.up_bytes + evaluated.down_bytes, evaluated.fetched_bytes or 0
            spent = Spent.of(self.run, scored=crossed, fetched=fetched)
            return Row(label, evaluated.score, evaluated.per_row, spent, (self.name,))
        found = [name for name, run in self._from_here().items() if run.eval.before.loss is not None]
        scored = self._scored(found[0], "before") if found else None
        # which bytes of that run were for this score is not known
        spent = Spent.of(self.run, scored=None)
        return self._row(label, scored, spent, (self.name, *found[:1]), self._evaluate())

    def _carried_on(self) -> dict[str, RunReport]:
        done = {name: run for name, run in self._from_here().items() if run.eval.after.loss is not None}
        return dict(sorted(done.items(), key=lambda item: item[1].steps))

    def _carried_on_row(self, name: str, run: RunReport) -> Row:
        label = f"plus {run.steps:,} true step{'' if run.steps == 1 else 's'}"
        return Row(label, *self._scored(name, "after"), Spent.of(self.run, run), (self.name, name))

    def _not_carried_on(self) -> Row:
        how = f"--steps N {stepping(self.run)} {_ROWS}"
        command = f"edge_client train --method split --from {self._path} {self._server} {how} --out NEW"
        return self._row("plus N true steps", None, Spent(), (), command)

    def _throughout(self, name: str | None) -> Row:
        label = "true span throughout"
        command = f"edge_client train --method split {self._server} {self._tuning} {_ROWS} --out NEW"
        if name is None:
            return self._row(label, None, Spent(), (), command)
        return self._row(label, self._scored(name, "after"), Spent.of(self.reports[name]), (name,), command)

    def _reference(self) -> str | None:
        """Of the runs on the true span throughout the likest to this one, and not the best."""
        own = self.run
        found = [(name, run) for name, run in self._on_the_true_span().items() if run.eval.after.loss is not None]
        likest = min(
            found,
            key=lambda item: (
                item[1].peft_type != own.peft_type,
                item[1].params.trainable != own.params.trainable,
                len(differences(own, item[1])),
                abs(item[1].steps - own.steps),
            ),
            default=None,
        )
        return likest[0] if likest is not None else None

    def _evaluated(self, adapter: str | None) -> Line | None:
        """The latest evaluation of an adapter (None: of the model without) on the true span and on the run's own rows.

        An adapter that is no longer the run's was scored before the run went on.
        """
        fitting = [
            one
            for one in self._kept(self.name).evaluations
            if one.span != "emulated" and one.adapter == adapter and one.data == self.run.eval_data
        ]
        return fitting[-1] if fitting else None

    def _scored(self, name: str, when: Literal["before", "after"]) -> _Scored:
        """A run's own score, and the figures of its rows if they are those of that score."""
        score: Score = getattr(self.reports[name].eval, when)
        rows: PerRow | None = getattr(self._kept(name), when)
        return _Scored(score, rows if rows is not None and rows.are_of(score) else None)

    def _kept(self, name: str) -> Kept:
        return self.kept.get(name, Kept(name))

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

    def _row(self, label: str, scored: _Scored | None, spent: Spent, runs: tuple[str, ...], command: str) -> Row:
        if scored is not None and scored.score.loss is not None:
            return Row(label, *scored, spent, runs)
        return Row(label, command=command)

    def _evaluate(self) -> str:
        there = "" if self.run.server else f" {self._server}"
        return f"edge_client evaluate --run {self._path} --data HELD-OUT --span remote{there}"

    def _again(self) -> str:
        """The command that scores the run: nothing can be compared with one that had no rows to be scored on."""
        if self.run.eval_data is not None:
            return f"edge_client train --resume --out {self._path}"
        emulator = self._server if self.run.server else "--emulator DIR"
        return f"edge_client train --method offsite {emulator} {self._tuning} {_ROWS} --out {_AGAIN}"

    @property
    def _path(self) -> str:
        """The run's directory, or that of the run which must be made in its place to have scores."""
        return shlex.quote(self._kept(self.name).path) if self.run.eval_data is not None else _AGAIN

    @property
    def _tuning(self) -> str:
        """Flags that make the same tuning."""
        return f"--cut {self.run.cut} {placing(self.run)} --steps {self.run.steps} {stepping(self.run)}"

    @property
    def _server(self) -> str:
        return f"--server {self.run.server or 'HOST:PORT'}"
