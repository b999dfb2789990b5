"""What a plan is told: the settings of `train` that decide what a run costs, and those of the plan alone.

Knows names and which belong together; reads no model and plans nothing. The settings of a run are checked by
`TrainConfig`, which also wants rows and a server: a plan has neither, and says so where a run would name them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, create_model

from edge_client.config import KeptPath, TrainConfig
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.settings import read_yaml, validated

SHARED: Final = ("method", "cut", "batch_size", "microbatches", "max_length", "steps", "epochs", "dtype")
"""Settings of `train` that every method takes."""

OF_ENDS: Final = ("peft", "peft_option", "rank", "alpha", "targets", "dropout")
OF_SIDE: Final = ("reduction", "tap_every", "tap_width")
OF_PORTS: Final = ("exchange", "init", "kr_active", "kr_period", "kr_warmup", "kr_idle", "kr_criterion")
OF_SPAN_LORA: Final = ("rank", "alpha", "targets", "dropout")

TAKEN: Final[Mapping[str, tuple[str, ...]]] = {
    "split": (*SHARED, *OF_ENDS, "train", "deterministic", "codec", "codec_gradient"),
    "side": (*SHARED, *OF_SIDE, "deterministic", "codec", "codec_port"),
    "dlora": (*SHARED, *OF_SPAN_LORA, *OF_PORTS, "codec", "codec_gradient", "codec_port"),
    "offsite": (*SHARED, *OF_ENDS, "train"),
    "local": (*SHARED, *OF_ENDS, "train", "exchange", "init"),
}
"""Settings of `train` that decide what a run of each method costs."""

DECIDING: Final = tuple(dict.fromkeys(name for names in TAKEN.values() for name in names))

_OF_A_RUN: Final[Mapping[str, Any]] = {name: (one.annotation, one) for name, one in TrainConfig.model_fields.items()}
_Told: Final[type[BaseModel]] = create_model("_Told", **{name: _OF_A_RUN[name] for name in DECIDING})
"""Each by itself, as `TrainConfig` takes it; whether they go together depends on the method."""

USUAL_CUT: Final = "2:2"
USUAL_LENGTH: Final = 256
USUAL_ROWS: Final = 1000
USUAL_EMULATOR: Final = "drop:0.5"

NO_ROWS: Final = Path("rows-of-a-plan.jsonl")
NO_SERVER: Final = "plan:0"
NO_MODEL: Final = "model-of-a-plan"
"""What stands in a plan's `TrainConfig` where a run's names a file, a server or a whole model: nothing opens them."""


class PlanSettings(BaseModel):
    """What `edge_client plan` is told.

    Attributes:
        model: a directory, a `config.json`, an id that was fetched before, or a shipped configuration's name.
        run: settings of `train`, by name, as they were told.
        length, losses, rows, tokens, data: of the rows that are trained on.
        link, edge, cloud: named, or a line as RTT:UP:DOWN.
        edge_tflops, cloud_tflops: what a device does in place of its own, 10^12 FLOPs a second.
        cloud_dtype: of the span's weights.
        calibration: a file that `edge_client calibrate` wrote; what is named stands in place of what it has.
        threads: of the edge that was calibrated.
        emulator: an emulator's folder, or one that might be built, such as drop:0.5 (`edge_client.plan_emulator`).
        edge_memory, max_bytes, max_hours: limits.
        fit: find the best plan within them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    run: dict[str, Any] = Field(default_factory=dict)
    length: Annotated[int, Field(ge=2)] | None = None
    losses: Annotated[int, Field(ge=1)] | None = None
    rows: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=2)] | None = None
    data: KeptPath | None = None
    link: str | None = None
    edge: str | None = None
    cloud: str | None = None
    edge_tflops: Annotated[float, Field(gt=0)] | None = None
    cloud_tflops: Annotated[float, Field(gt=0)] | None = None
    cloud_dtype: Literal["float32", "bfloat16"] = "float32"
    calibration: KeptPath | None = None
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    emulator: str = USUAL_EMULATOR
    edge_memory: Annotated[ByteSize, Field(ge=1)] | None = None
    max_bytes: Annotated[ByteSize, Field(ge=1)] | None = None
    max_hours: Annotated[float, Field(gt=0)] | None = None
    fit: bool = False

    @classmethod
    def read(cls, file: Path | None, flags: Mapping[str, Any]) -> "PlanSettings":
        """The file's settings, overridden by every flag that was given (is not None).

        Raises:
            UsageError: the file is unreadable, a key is unknown, a value does not fit, or values contradict each other.
        """
        told = read_yaml(file) if file is not None else {}
        told |= {name: value for name, value in flags.items() if value is not None}
        if "run" in told:
            raise UsageError(f"{file}: no setting 'run'; write the settings of a run beside the others")
        run = {name: told.pop(name) for name in DECIDING if told.get(name) is not None}
        settings = validated(cls, {**told, "run": _each(run)}, file)
        settings._agree()
        return settings

    def _agree(self) -> None:
        """Refuse what contradicts itself, whatever the model.

        Raises:
            UsageError: as said.
        """
        if self.data is not None and (self.length or self.losses or self.rows or self.tokens):
            raise UsageError("--data tells lengths and rows; leave out --length, --losses, --rows and --tokens")
        if self.rows is not None and self.tokens is not None:
            raise UsageError("--rows and --tokens both say how much data there is; give one")
        if self.fit and not (self.edge_memory or self.edge or self.max_bytes or self.max_hours):
            raise UsageError("--fit keeps limits; give --edge-memory, --edge NAME, --max-bytes or --max-hours")
        if self.length is not None and self.length >= self.run.get("max_length", self.length + 1):
            rows = f"rows of {self.length + 1} tokens"
            raise UsageError(f"--length {self.length} runs {rows}; raise --max-length, which cuts them")
        if self.losses is not None and self.losses >= self.asked_length:
            raise UsageError(f"--losses {self.losses} must be fewer than a row's tokens; a first token is never learnt")
        if self.threads is not None and self.calibration is None:
            raise UsageError("--threads says how many of a calibrated device's; give --calibration FILE")
        if self.threads is not None and (self.edge is not None or self.edge_tflops is not None):
            raise UsageError("--threads is of a calibrated device; leave it out, or leave out --edge and --edge-tflops")
        Cut.parse(str(self.cut))
        if self.run.get("method") is not None:
            self._refuse_unfit(self.run["method"])
            self.configured({})

    def _refuse_unfit(self, method: str) -> None:
        taken = TAKEN.get(method, DECIDING)
        for name in self.run:
            if name not in taken:
                raise UsageError(f"--{name.replace('_', '-')} decides nothing with --method {method}; leave it out")

    @property
    def cut(self) -> str:
        """Where the model is cut."""
        return str(self.run.get("cut", USUAL_CUT))

    @property
    def asked_length(self) -> int:
        """Tokens of a row that are run, where no file tells: all but the last of those that `train` keeps."""
        return self.length or min(USUAL_LENGTH, self.run.get("max_length", USUAL_LENGTH + 1) - 1)

    @property
    def longest_kept(self) -> int:
        """Tokens of a file's row at most, as `train` keeps them."""
        return int(self.run.get("max_length", TrainConfig.model_fields["max_length"].default))

    def configured(self, chosen: Mapping[str, Any]) -> TrainConfig:
        """The settings of a run: what was told that its method takes, and `chosen` over it.

        Raises:
            UsageError: they make no sense.
        """
        method = chosen.get("method", self.run.get("method", "split"))
        told = {name: value for name, value in self.run.items() if name in TAKEN.get(method, DECIDING)}
        merged = {"cut": USUAL_CUT, **told, **chosen, "method": method}
        if "kr_active" in chosen and chosen["kr_active"] is None:
            merged = {name: value for name, value in merged.items() if not name.startswith("kr_")}
        if "max_length" not in merged:
            merged["max_length"] = max(self.longest_kept, self.asked_length + 1)
        absent = {"data": NO_ROWS} | ({"model": NO_MODEL} if method == "local" else {"server": NO_SERVER})
        return validated(TrainConfig, {**merged, **absent})


def _each(run: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run, each as its type has it.

    Raises:
        UsageError: one cannot be what it was told to be.
    """
    told = validated(_Told, {"method": "split", **run})
    return {name: getattr(told, name) for name in run}
