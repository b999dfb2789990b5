"""`cloud_node emulator`: build the stand-in of a span that is shipped to edges, and measure one anew.

Knows flags; what is done with them is called, and imported where it is.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from isthmus.command import importing
from isthmus.emulated.recipe import Method
from isthmus.errors import UsageError
from isthmus.settings import read_settings

app = typer.Typer(no_args_is_help=True, help="Build and measure lossy stand-ins of a span (Offsite-Tuning).")

Count = Annotated[int, Field(ge=1)]
Threads = Annotated[int | None, typer.Option(help="CPU threads for computing [all cores]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto]")]
MaxLength = Annotated[int | None, typer.Option(help="tokens of a row of text at most [256]")]
AsJson = Annotated[bool, typer.Option("--json", help="print what was found as JSON")]

MAX_LENGTH = 256


class BuildConfig(BaseModel):
    """Settings of a build; each is a flag."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    out: Path
    cut: str = "2:2"
    method: Method = "rank"
    keep: int | float | None = None
    bits: Literal[4, 8] | None = None
    text: Path | None = None
    distill: Path | None = None
    steps: Count = 200
    batch_size: Count = 8
    lr: Annotated[float, Field(gt=0)] = 1e-4
    seed: Annotated[int, Field(ge=0)] = 0
    minimum_gap: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max_length: Annotated[int, Field(ge=2)] = MAX_LENGTH
    device: str = "auto"
    threads: Count | None = None
    certs: Path | None = None

    @field_validator("keep", mode="before")
    @classmethod
    def _blocks_or_share(cls, keep: Any) -> Any:
        if not isinstance(keep, str):
            return keep
        try:
            return int(keep) if keep.isdecimal() else float(keep)
        except ValueError:
            raise UsageError(f"{keep!r} is neither a whole number of blocks nor a share such as 0.5") from None

    @model_validator(mode="after")
    def _distilled_if_said_how(self) -> "BuildConfig":
        said = self.model_fields_set & {"steps", "batch_size", "lr", "seed"}
        if said and self.distill is None:
            raise UsageError(f"--{min(said).replace('_', '-')} is for distilling: give --distill F.jsonl or F.txt too")
        return self


@app.command("build", epilog="Example: cloud_node emulator build --model M --text F --out E")
def build_command(
    out: Annotated[Path, typer.Option(help="folder for the bundle: absent or empty")],
    model: Annotated[str | None, typer.Option(help="directory or Hugging Face id of the model")] = None,
    cut: Annotated[str | None, typer.Option(help="bottom:top [2:2]")] = None,
    method: Annotated[str | None, typer.Option(help="drop, share, rank or quant [rank]")] = None,
    keep: Annotated[
        str | None, typer.Option(help="blocks, or a share: of the blocks; for rank of each matrix [0.75]")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8 bits a weight, with any method")] = None,
    text: Annotated[
        Path | None, typer.Option(help="public .jsonl or .txt to calibrate and measure on [--distill]")
    ] = None,
    distill: Annotated[Path | None, typer.Option(help="public .jsonl or .txt to distil on")] = None,
    steps: Annotated[int | None, typer.Option(help="of distillation [200]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows of a distillation step [8]")] = None,
    lr: Annotated[float | None, typer.Option(help="peak rate of distillation [1e-4]")] = None,
    seed: Annotated[int | None, typer.Option(help="of distillation [0]")] = None,
    minimum_gap: Annotated[
        float | None,
        typer.Option(help="refuse an emulator whose gap's lower limit at 95 % is under so many nats per token"),
    ] = None,
    max_length: MaxLength = None,
    device: Device = None,
    threads: Threads = None,
    certs: Annotated[Path | None, typer.Option(help="folder of the server's certificate, whose key signs")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a distillation that was interrupted")] = False,
    as_json: AsJson = False,
) -> None:
    """Build an emulator of a model's span, and say how far it is from it."""
    given = {
        "model": model,
        "out": out,
        "cut": cut,
        "method": method,
        "keep": keep,
        "bits": bits,
        "text": text,
        "distill": distill,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "minimum_gap": minimum_gap,
        "max_length": max_length,
        "device": device,
        "threads": threads,
        "certs": certs,
    }
    settings = read_settings(BuildConfig, None, given)
    with importing():
        from cloud_node import building

    building.build_emulator(settings, resume, as_json)


@app.command("evaluate", epilog="Example: cloud_node emulator evaluate --emulator E --model DIR --text F.jsonl")
def evaluate_command(
    emulator: Annotated[Path, typer.Option(help="folder of an emulator's bundle")],
    model: Annotated[str, typer.Option(help="directory or Hugging Face id of the model that it was built from")],
    text: Annotated[Path, typer.Option(help="public .jsonl or .txt; its last tenth is measured, 64 rows at most")],
    max_length: MaxLength = None,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Check that an emulator is whole and of this model, and measure anew how far it is from its span."""
    with importing():
        from cloud_node import building

    row_tokens = MAX_LENGTH if max_length is None else max_length
    building.measure_anew(emulator, model, text, row_tokens, device or "auto", threads, as_json)
