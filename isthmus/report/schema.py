"""`run.json`: the fields of a run's report, and how it is read and saved.

Knows the file and which blocks are in it; what a block holds stands in `isthmus.report.fields`. Measures nothing and
formats nothing. A figure that does not exist is null.
"""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, AwareDatetime, Field, ValidationError

from isthmus.durable import write_whole
from isthmus.errors import RunError
from isthmus.report.fields.block import Amount, Block, Count, Digest, Share
from isthmus.report.fields.cost import Agreement, Cost
from isthmus.report.fields.offsite import Offsite
from isthmus.report.fields.ports import Ports
from isthmus.report.fields.run import (
    BegunFrom,
    Codecs,
    Params,
    Sample,
    Settings,
    SideNetwork,
    Throughput,
    Tokens,
    Versions,
)
from isthmus.report.fields.score import Evaluation
from isthmus.report.fields.stage import Stage

SCHEMA: Final = "isthmus-run/1"
FILE_NAME: Final = "run.json"


def _utc(time: datetime) -> datetime:
    if time.utcoffset() != timedelta(0):
        raise ValueError("the time is not in UTC")
    return time


Time: TypeAlias = Annotated[AwareDatetime, AfterValidator(_utc)]


class RunReport(Block):
    """A whole run. The fields without a default are the contract; the others were added to it.

    `train`: which ends of the model train; with `top` no gradient crosses. `adapter` is the SHA-256 of the adapter's
    tensors, `eval_data` that of the file of rows it was scored on. `stages`: all that was spent, by phase, and what an
    emulator's owner told of building it.
    """

    schema_: Literal["isthmus-run/1"] = Field(SCHEMA, alias="schema")
    method: Literal["split", "dlora", "side", "offsite", "local"]
    exchange: Literal["activations", "core", "parameters"] | None
    model: str
    model_digest: str | None
    cut: str | None
    peft_type: str | None
    seed: Count
    deterministic: bool
    steps: Count
    epochs: Amount | None
    tokens: Tokens
    eval: Evaluation
    params: Params
    throughput: Throughput
    cost: Cost
    status: Literal["complete", "interrupted", "failed"] | None = None
    started: Time | None = None
    finished: Time | None = None
    train_seconds: Amount | None = None
    final_loss: Amount | None = None
    versions: Versions | None = None
    device: str | None = None
    dtype: str | None = None
    codecs: Codecs | None = None
    server: str | None = None
    link: str | None = None
    adapter_format: Literal["peft", "isthmus"] | None = None
    agreement: Agreement | None = None
    samples: tuple[Sample, ...] = ()
    train: Literal["both", "top"] | None = None
    side: SideNetwork | None = None
    dropout: Share | None = None
    ports: Ports | None = None
    offsite: Offsite | None = None
    begun_from: BegunFrom | None = None
    adapter: Digest | None = None
    eval_data: Digest | None = None
    settings: Settings | None = None
    stages: tuple[Stage, ...] = ()

    @classmethod
    def load(cls, path: Path) -> "RunReport":
        """Read the report of a run directory, or a `run.json` itself.

        Raises:
            RunError: it is missing, unreadable, of another schema version or malformed.
        """
        file = path / FILE_NAME if path.is_dir() else path
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            raise RunError(f"{file} does not exist; name the directory of a run") from None
        except OSError as error:
            raise RunError(f"{file} cannot be read: {error.strerror}") from None
        _check_version(file, content)
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise RunError(f"{file} is not a report of this schema: {_first(error)}") from None

    def save(self, path: Path) -> None:
        """Write to a run directory, or to a file; a crash leaves the old report or the new one, never a part.

        Raises:
            OSError: the file cannot be written.
        """
        file = path / FILE_NAME if path.is_dir() else path
        write_whole(file, (self.model_dump_json(indent=2) + "\n").encode())


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of `run.json`."""
    schema = RunReport.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": SCHEMA}


def _check_version(file: Path, content: bytes) -> None:
    try:
        found = json.loads(content)
    except ValueError as error:
        why = f"{file} is no {FILE_NAME}, for it is not JSON ({error})"
        raise RunError(f"{why}; name a run's directory, or restore the file") from None
    if not isinstance(found, dict) or "schema" not in found:
        raise RunError(f"{file} is no {FILE_NAME}, for it says no schema; name a run's directory, or restore the file")
    version = found["schema"]
    if version != SCHEMA:
        raise RunError(f"{file} has schema {version!r}; this version of isthmus reads {SCHEMA!r}")


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'the whole'}: {problem['msg']}"
