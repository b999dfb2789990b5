"""`evaluations.jsonl`: scores of a run's adapter, or of the model without it, taken after the run.

Knows fields and the file; scores nothing.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from isthmus.errors import RunError
from isthmus.report.schema import Amount, Block, Count, Digest, Score

FILE_NAME = "evaluations.jsonl"


class Evaluated(Block):
    """One line: where the blocks between the ends were, on which rows, and what came of it.

    Attributes:
        span: `remote` and `local` are the true span, `emulated` the emulator.
        untouched: the model was scored without the run's adapter.
        data: SHA-256 of the rows' file.
        tokens_per_s: real tokens.
    """

    span: Literal["remote", "local", "emulated"]
    untouched: bool
    data: Digest
    rows: Annotated[int, Field(ge=1)]
    score: Score
    up_bytes: Count
    down_bytes: Count
    tokens_per_s: Amount | None


def append(run: Path, line: Evaluated) -> None:
    """Add a line to a run's file.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with (run / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json() + "\n")
    except OSError as error:
        raise RunError(f"{run / FILE_NAME} cannot be written ({error.strerror}); check the disk") from None


def read(run: Path) -> tuple[Evaluated, ...]:
    """A run's evaluations, oldest first; none where there is no file.

    Raises:
        RunError: a line is malformed.
    """
    path = run / FILE_NAME
    if not path.is_file():
        return ()
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(Evaluated.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise RunError(f"{path}:{number}: not an evaluation ({problem}); delete the line") from None
    return tuple(found)
