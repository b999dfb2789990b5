"""What a run's directory has of scores beside `run.json`: each row's in `scores.json`, later ones in
`evaluations.jsonl`.

Knows fields and these files; scores and compares nothing.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeAlias, TypeVar, get_args

from pydantic import Field, ValidationError, model_validator

from isthmus.durable import sync
from isthmus.errors import RunError
from isthmus.ledger.told import Told
from isthmus.report.fields.block import Amount, Block, Count, Digest
from isthmus.report.fields.score import Score
from isthmus.report.fields.stage import Stage
from isthmus.report.verdict import Figures

FILE_NAME = "evaluations.jsonl"
SUBMISSIONS_NAME = "submissions.jsonl"
SCORES_NAME = "scores.json"
ScoresSchema: TypeAlias = Literal["isthmus-scores/1"]
SCORES_SCHEMA: Final[str] = get_args(ScoresSchema)[0]

Parsed = TypeVar("Parsed", bound=Block)


class PerRow(Block):
    """Figures of each row, in the rows' order, as `isthmus.report.verdict.Figures` has them."""

    nats: tuple[float, ...]
    tokens: tuple[Annotated[int, Field(ge=1)], ...]
    correct: tuple[bool, ...]

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if not len(self.correct) <= len(self.nats) == len(self.tokens) > 0:
            raise ValueError("the figures are not of the same rows")
        return self

    def are_of(self, score: Score) -> bool:
        """Whether a score is what these figures come to."""
        loss = sum(self.nats) / sum(self.tokens)
        right = sum(self.correct) if self.correct else None
        return score.loss is not None and math.isclose(loss, score.loss, rel_tol=1e-9) and right == score.correct


class Evaluated(Block):
    """What was scored after the run, where the blocks between the ends were, and what came of it.

    Attributes:
        span: `remote` and `local` are the true span, `emulated` the emulator.
        emulator: its bundle's id; None on the true span.
        untouched: the model was scored without the run's adapter.
        adapter: SHA-256 of the tensors of the adapter that was scored, as `run.json` has it; None where untouched.
        data: SHA-256 of the rows' file.
        tokens_per_s: real tokens.
        fetched_bytes: both ways, of bundles that were not here before; None where older lines do not say.
        cost: all that scoring cost either side; likewise.
    """

    span: Literal["remote", "local", "emulated"]
    emulator: Digest | None
    untouched: bool
    adapter: Digest | None
    data: Digest
    rows: Annotated[int, Field(ge=1)]
    score: Score
    up_bytes: Count
    down_bytes: Count
    tokens_per_s: Amount | None
    fetched_bytes: Count | None = None
    cost: Stage | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.untouched != (self.adapter is None):
            raise ValueError("the adapter is to be named where one was scored, and only there")
        if (self.span == "emulated") != (self.emulator is not None):
            raise ValueError("the emulator is to be named where one was used, and only there")
        return self


class Line(Evaluated):
    """An evaluation as the file has it: with the figures of each row."""

    per_row: PerRow


class Submitted(Block):
    """An adapter that was handed in: the ids of its bundle and of its tensors, and what handing it in cost."""

    bundle: Digest
    adapter: Digest
    cost: Stage


class _Scores(Block):
    """`scores.json`: figures of the rows that a run was scored on, before and after training."""

    schema_: ScoresSchema = Field(alias="schema")
    before: PerRow | None
    after: PerRow | None


@dataclass(frozen=True)
class Kept:
    """Where a run is, as it was named, and what is there beside its report.

    Attributes:
        evaluations, submissions: oldest first.
        told: what the model's owner says of stages that it did.
        before, after: figures of each row of the run's own scores; None: they are not there.
    """

    path: str
    evaluations: tuple[Line, ...] = ()
    before: PerRow | None = None
    after: PerRow | None = None
    submissions: tuple[Submitted, ...] = ()
    told: tuple[Told, ...] = ()


def append(run: Path, found: Evaluated, figures: Figures) -> None:
    """Add an evaluation and the figures of its rows to a run's file, durably; a torn last line makes room for it.

    Raises:
        RunError: it cannot be written.
    """
    rows = PerRow(nats=tuple(figures.nats), tokens=tuple(figures.tokens), correct=tuple(figures.correct))
    _append(run / FILE_NAME, Line(**vars(found), per_row=rows))


def note_submission(run: Path, submitted: Submitted) -> None:
    """Add to a run's file that its adapter was handed in, likewise.

    Raises:
        RunError: it cannot be written.
    """
    _append(run / SUBMISSIONS_NAME, submitted)


def _append(path: Path, line: Block) -> None:
    try:
        with path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            kept = _whole(type(line), content)
            if kept != content:
                file.truncate(len(kept))
            begin = b"\n" if kept and not kept.endswith(b"\n") else b""
            file.write(begin + line.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); check the disk") from None


def read(path: Path) -> Kept:
    """What the directory of a run has beside its report; of a report that is named itself, only where it is.

    Raises:
        RunError: a file is malformed.
    """
    if not path.is_dir():
        return Kept(str(path.parent))
    scores = path / SCORES_NAME
    own = _parsed(_Scores, _content(scores), f"{scores}: not scores", "delete the file") if scores.is_file() else None
    return Kept(
        str(path),
        _lines(Line, path / FILE_NAME, "not an evaluation"),
        own.before if own is not None else None,
        own.after if own is not None else None,
        _lines(Submitted, path / SUBMISSIONS_NAME, "not a submission"),
    )


def _lines(kind: type[Parsed], file: Path, what: str) -> tuple[Parsed, ...]:
    whole = _whole(kind, _content(file)).splitlines() if file.is_file() else ()
    return tuple(
        _parsed(kind, line, f"{file}:{at}: {what}", "delete the line") for at, line in enumerate(whole, start=1)
    )


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RunError(f"{file} cannot be read ({error.strerror}); check the disk") from None


def _whole(kind: type[Block], lines: bytes) -> bytes:
    """Lines without the last one, if that was torn off by a crash or a full disk."""
    before, newline, last = lines.rpartition(b"\n")
    try:
        kind.model_validate_json(last)
    except ValidationError:
        return before + newline
    return lines


def _parsed(kind: type[Parsed], content: bytes, what: str, remedy: str) -> Parsed:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise RunError(f"{what} ({error.errors()[0]['msg']}); {remedy}") from None
