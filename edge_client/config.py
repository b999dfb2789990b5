"""What a run is told: flags over a configuration file, checked, and kept in the run's `config.yaml`.

Knows names, types and which combinations make sense; reads no data and starts nothing.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, StrictInt, StrictStr, model_validator

from edge_client.kill_revive import Criterion
from edge_client.pacing import Pace
from edge_client.peft_methods import METHODS, OLDER_ALPHA, OLDER_RANK, check
from edge_client.placement import Placement, SideShape
from isthmus.classifier import FEWEST_LABELS, MOST_LABELS, Head
from isthmus.core_shape import MAX_RANK, CoreShape, Init
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.rounds.limits import FEWEST, LARGEST_CLIP, MOST_EDGES
from isthmus.settings import validated
from isthmus.trust.profiles import NAME

CodecName = Literal["none", "bf16", "fp16", "int8"]
Count = Annotated[int, Field(ge=1)]
KeptPath = Annotated[Path, AfterValidator(Path.absolute)]
"""Absolute, so that a run can be used from any directory."""

GIB = 1 << 30

BUNDLE_ID = re.compile(r"[0-9a-f]{64}")

PLACED = (
    *("cut", "train", "peft", "peft_option", "rank", "alpha", "targets", "dropout", "exchange", "init"),
    *("reduction", "tap_every", "tap_width", "labels"),
)
"""Settings that say what trains and where; a run that begins from another's adapter has them from it."""

MAY_CHANGE = frozenset(
    {"server", "certs", "insecure", "device", "threads", "patience", "checkpoint_every", "cache", "cache_limit", "link"}
    | {"watch", "key_file", "round_patience"}
)
"""Settings that a resumed run may be given anew; all others decide what is computed."""

DIGESTED = frozenset({"data", "eval_data", "model", "emulator", "kr_scores", "from_run"})
"""Settings that name files, which may be moved while a run rests: a checkpoint keeps what the files hold."""


ROUNDS = ("round_every", "cohort", "clip", "round_patience")
"""Settings of rounds beside their name."""

PICKING = ("kr_period", "kr_warmup", "kr_idle", "kr_criterion", "kr_scores")
"""Settings of Kill-and-Revive beside the share that it keeps."""


def _is_folder(emulator: str, served: bool) -> bool:
    """Whether an emulator is named as a folder, whatever there is on the disk: a server's names stand alone."""
    written_so = "/" in emulator or emulator in (".", "..", "~")
    return written_so or not (served or BUNDLE_ID.fullmatch(emulator))


def _strength(given: dict[str, Any]) -> dict[str, Any]:
    """Rank and alpha as told, or as the method has them where they are not."""
    name = given.get("peft") or "lora"
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        return {}
    told = {setting: given.get(setting) for setting in ("rank", "alpha")}
    if method.config is None and (told["rank"], told["alpha"]) == (OLDER_RANK, OLDER_ALPHA):
        return {"rank": None, "alpha": None}
    return {
        "rank": method.default("rank") if told["rank"] is None else told["rank"],
        "alpha": method.default("alpha") if told["alpha"] is None else told["alpha"],
    }


class TrainConfig(BaseModel):
    """Settings of a run; each is a flag and a key of the configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["split", "dlora", "side", "offsite", "local"]
    data: KeptPath
    eval_data: KeptPath | None = None
    server: str | None = None
    certs: KeptPath | None = None
    insecure: bool = False
    model: str | None = None
    cut: str | None = None
    emulator: str | None = None
    watch: Annotated[int, Field(ge=0)] = 0
    from_run: KeptPath | None = None
    train: Literal["both", "top"] = "both"
    peft: str = "lora"
    peft_option: dict[str, Any] = Field(default_factory=dict)
    rank: Count | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: list[str] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    reduction: Literal[4, 8, 16] = 8
    tap_every: Count = 4
    tap_width: Count = 64
    exchange: Literal["activations", "core", "parameters"] | None = None
    init: Init | None = None
    kr_active: Annotated[float, Field(gt=0, le=1)] | None = None
    kr_period: Count = 10
    kr_warmup: Count = 5
    kr_idle: Literal["drop", "park"] = "drop"
    kr_criterion: Criterion = "importance"
    kr_scores: KeptPath | None = None
    cache: KeptPath | None = None
    cache_limit: Annotated[ByteSize, Field(ge=1)] = ByteSize(20 * GIB)
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Count = 8
    microbatches: Count = 1
    eval_batch_size: Count = 32
    lr: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    max_length: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0)] = 0
    deterministic: bool = False
    codec: CodecName = "none"
    codec_gradient: CodecName | None = None
    codec_port: CodecName | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    threads: Count | None = None
    checkpoint_every: Count = 50
    join: str | None = None
    round_every: Count = 50
    cohort: Annotated[int, Field(ge=FEWEST, le=MOST_EDGES)] = FEWEST
    clip: Annotated[float, Field(gt=0, le=LARGEST_CLIP)] = 1.0
    round_patience: Annotated[float, Field(gt=0)] = 3600.0
    patience: Annotated[float, Field(gt=0)] = 120.0
    link: str | None = None
    sample: str | None = None
    seal: bool = False
    key_file: KeptPath | None = None
    labels: tuple[StrictInt | StrictStr, ...] | None = None  # of what is trained on: read from the data, not told

    @model_validator(mode="before")
    @classmethod
    def _methods_imply(cls, given: Any) -> Any:
        if given.get("method") == "side":
            given = {**given, "peft": given.get("peft") or "side"}
        given = {**given, **_strength(given)}
        if given.get("exchange") == "core":
            given["init"] = given.get("init") or "svd"
        if given.get("method") == "dlora":
            return {**given, "exchange": given.get("exchange") or "activations"}
        named = given.get("emulator")
        if isinstance(named, str) and _is_folder(named, given.get("server") is not None):
            folder = Path(named).expanduser() if named.partition("/")[0] == "~" else Path(named)
            return {**given, "emulator": str(folder.absolute())}
        return given

    @model_validator(mode="after")
    def _makes_sense(self) -> "TrainConfig":
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs contradict each other; give one")
        if self.crosses and self.server is None:
            raise UsageError(f"--method {self.method} needs --server HOST:PORT")
        self._has_an_emulator_where_it_needs_one()
        if self.method != "local" and self.model is not None:
            raise UsageError(f"--model goes with --method local; with {self.method} the model is the server's")
        self._trains_something_that_exists()
        self._has_ports_where_it_needs_them()
        if self.method == "local" and (self.model is None or self.cut is None):
            raise UsageError("--method local needs --model DIR_OR_ID and --cut bottom:top, where the adapters go")
        self._can_join()
        if self.deterministic and self.device.startswith("cuda"):
            raise UsageError("--deterministic is promised on the CPU alone; leave out --device cuda")
        if self.cut is not None:
            Cut.parse(self.cut)
        if self.link is not None:
            Pace.parse(self.link)
        if self.labels is not None:
            self._can_classify()
        if self.key_file is not None and not self.seal and self.from_run is None:
            raise UsageError("--key-file opens what is sealed; give --seal as well, or leave it out")
        if self.seal and self.sample is not None:
            raise UsageError("--sample leaves its text in run.json, which is not sealed; use `edge_client generate`")
        return self

    def _can_join(self) -> None:
        told = [name for name in ROUNDS if getattr(self, name) != type(self).model_fields[name].default]
        if self.join is None:
            if told:
                raise UsageError(f"--{told[0].replace('_', '-')} is of rounds; give --join NAME, or leave it out")
            return
        if not NAME.fullmatch(self.join):
            raise UsageError(f"--join {self.join[:64]!r}: a name is 1 to 63 of a-z, 0-9, '.', '_', '-'")
        if not self.crosses or self.certs is None:
            raise UsageError("--join needs a method that trains against --server, and --certs, which sign what is sent")
        if self.steps is None or self.steps % self.round_every:
            raise UsageError(f"--join needs --steps that are rounds of {self.round_every}; change it or --round-every")
        if self.kr_active is not None or self.peft == "adalora":
            raise UsageError("in rounds all edges train the same values; leave out --kr-active and --peft adalora")

    def _can_classify(self) -> None:
        labels = self.labels or ()
        if not max(FEWEST_LABELS, len(labels)) <= len(set(labels)) <= MOST_LABELS or len(set(map(type, labels))) > 1:
            raise UsageError(
                f"a classifier tells {FEWEST_LABELS} to {MOST_LABELS:,} labels apart, each named once, all strings or "
                "all integers; correct `labels`"
            )
        if self.method == "offsite":
            raise UsageError("emulators are of language models; train a classifier with --method split")
        if METHODS[self.peft].place in ("prompt", "beside", "embedding"):
            raise UsageError(f"--peft {self.peft} trains no classifier's head; use lora, bitfit, full or head")
        if self.sample is not None:
            raise UsageError("--sample continues a text, which a classifier does not; leave it out")

    def _trains_something_that_exists(self) -> None:
        check(self.peft, self.rank, self.alpha, self.dropout, self.peft_option)
        if self.peft == "p-tuning" and self.from_run is not None:
            raise UsageError("p-tuning saves its prompt, not the encoder that makes it; leave out --from")
        if (self.method == "side") > (self.peft == "side"):
            raise UsageError(f"--method side trains a side network; leave out --peft {self.peft}")
        if (self.peft == "side") and self.method == "split":
            raise UsageError("--peft side is what --method side trains; give that")
        if self.forward_only and self.codec_gradient is not None:
            raise UsageError("no gradient crosses in such a run; leave out --codec-gradient")
        if self.method == "split" and self.train == "both" and self.cache is not None:
            raise UsageError("--cache is for outputs that never change; it goes with --train top or --method side")
        if self.peft == "side" and self.targets is not None:
            raise UsageError("--targets goes with --peft lora; a side network stands beside all blocks")
        if self.peft == "side" and self.train == "top":
            raise UsageError("a side network stands beside the blocks; leave out --train top")

    def _has_an_emulator_where_it_needs_one(self) -> None:
        if self.method != "offsite":
            for name in ("emulator", "watch"):
                if getattr(self, name):
                    raise UsageError(f"--{name} goes with --method offsite; leave it out with {self.method}")
            return
        for name in () if self.watch else ("cache", "link", "codec", "codec_gradient", "codec_port"):
            if getattr(self, name) != type(self).model_fields[name].default:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is for what crosses, and nothing does with --method offsite; leave it out")
        if self.server is None and self.emulator is None:
            raise UsageError("--method offsite needs --server HOST:PORT to fetch an emulator from, or --emulator DIR")
        if self.watch and self.server is None:
            raise UsageError("--watch scores the true span, which needs --server HOST:PORT")
        if self.peft == "side":
            raise UsageError("a side network stands beside all blocks, which an emulator lacks; leave out --peft side")

    def _has_ports_where_it_needs_them(self) -> None:
        if self.exchange is not None and self.method not in ("dlora", "local"):
            raise UsageError(f"--exchange goes with --method dlora; leave it out with {self.method}")
        if self.exchange is not None and (self.peft != "lora" or self.train == "top"):
            raise UsageError("--method dlora trains LoRA in all blocks; leave out --peft and --train")
        if self.exchange == "parameters":
            self._can_send_values()
        if self.exchange is not None and self.from_run is not None:
            raise UsageError("--from goes on with adapters of the ends; leave out --method dlora and --exchange")
        self._has_cores_that_fit()
        told = [name for name in PICKING if getattr(self, name) != type(self).model_fields[name].default]
        if self.method != "dlora" and (told or self.kr_active is not None):
            raise UsageError("Kill-and-Revive picks ports in the span; --kr-... goes with --method dlora")
        if self.kr_active is None and told:
            flag = f"--{told[0].replace('_', '-')}"
            raise UsageError(f"{flag} says how ports are picked; give --kr-active, the share of them that is kept")
        if self.kr_scores is not None and self.kr_criterion != "importance":
            raise UsageError("--kr-scores and --kr-criterion contradict each other; give one")

    def _can_send_values(self) -> None:
        if self.dropout and self.method == "dlora":
            raise UsageError("--dropout drops values on the edge, and --exchange parameters computes on the cloud")
        if self.kr_idle == "park":
            raise UsageError("--exchange parameters leaves no value on the cloud after a step; use --kr-idle drop")

    def _has_cores_that_fit(self) -> None:
        if self.exchange != "core":
            if self.init is not None:
                raise UsageError("--init says what stands around cores; it goes with --exchange core")
            return
        if self.rank is not None and self.rank > MAX_RANK:
            raise UsageError(f"--rank {self.rank}: cores are at most {MAX_RANK} wide; lower it")
        if self.dropout or self.peft_option:
            raise UsageError("a core sees no input of its module; leave out --dropout and --peft-option")
        if self.kr_idle == "park":
            raise UsageError("cores are not parked: killed ones are dropped; leave out --kr-idle park")

    @property
    def head(self) -> Head | None:
        """The classifier's head that is to be made; None for a language model."""
        return Head(len(self.labels), self.seed) if self.labels is not None else None

    def labelled(self, labels: tuple[str | int, ...] | None) -> "TrainConfig":
        """These settings for rows with labels, or without; labels that were told stand.

        Raises:
            UsageError: a classifier cannot be trained so.
        """
        if labels is None or self.labels is not None:
            return self
        return validated(TrainConfig, {**self.model_dump(), "labels": labels})

    def count_steps(self, rows: int) -> int:
        """Steps of a run over so many rows."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 1.0) * math.ceil(rows / self.batch_size)))

    @property
    def crosses(self) -> bool:
        """Whether the span is the cloud's, so that something crosses in a step."""
        return self.method not in ("local", "offsite")

    @property
    def in_span(self) -> bool:
        """Whether modules of the span's blocks are trained."""
        return self.exchange is not None

    @property
    def emulator_folder(self) -> Path | None:
        """The folder of the emulator; None where it must be fetched."""
        return Path(self.emulator) if self.emulator is not None and Path(self.emulator).is_absolute() else None

    @property
    def forward_only(self) -> bool:
        """Whether everything that trains lies above the span, so that its outputs never change."""
        return self.method == "side" or (self.method == "split" and self.train == "top")

    @property
    def placement(self) -> Placement:
        """What trains and where."""
        side = SideShape(self.reduction, self.tap_every, self.tap_width) if self.peft == "side" else None
        return Placement(
            self.peft,
            self.rank,
            self.alpha,
            self.targets,
            self.seed,
            only_top=self.train == "top",
            side=side,
            in_span=self.in_span,
            dropout=self.dropout,
            options=self.peft_option,
            cores=self._cores,
        )

    @property
    def _cores(self) -> CoreShape | None:
        if self.exchange != "core" or self.init is None or self.rank is None or self.alpha is None:
            return None
        return CoreShape(self.rank, self.init, self.seed, self.alpha)

    @property
    def gradient_codec(self) -> CodecName:
        """The codec of gradients: that of activations unless one is named."""
        return self.codec_gradient or self.codec

    @property
    def port_codec(self) -> CodecName:
        """The codec of what crosses at ports: that of activations unless one is named."""
        return self.codec_port or self.codec

    @property
    def pace(self) -> Pace | None:
        """How slow the line shall be; None: as it is."""
        return Pace.parse(self.link) if self.link is not None else None

    @classmethod
    def begun_from(cls, placed: dict[str, Any], given: dict[str, Any]) -> "TrainConfig":
        """The settings `given`, with what trains and where from an earlier run: its settings named in `PLACED`.

        Raises:
            UsageError: they make no sense, or say something else of what trains.
        """
        for name in PLACED:
            if given.get(name) is not None and given[name] != placed[name]:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} cannot differ from that of --from, which is {placed[name]}; leave it out")
        return validated(cls, {**placed, **given})

    def trusting(self, certs: Path | None, insecure: bool) -> dict[str, Any]:
        """The settings `certs` and `insecure` of a later command: what it is given stands in place of the run's own."""
        if certs is None and not insecure:
            return {"certs": self.certs, "insecure": self.insecure}
        return {"certs": certs, "insecure": insecure}

    def fixed(self) -> str:
        """SHA-256 in hex of the settings that no resumption may change; files named there have their own."""
        kept = self.model_dump(mode="json", exclude=set(MAY_CHANGE | DIGESTED), exclude_defaults=True)
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def resumed(self, given: dict[str, Any]) -> "TrainConfig":
        """These settings with those of `given` that a resumed run may change.

        Raises:
            UsageError: one was given that may not change.
        """
        trust = self.trusting(given.get("certs"), bool(given.get("insecure")))
        wanted = validated(TrainConfig, {**self.model_dump(), **trust, **given})
        may_change = MAY_CHANGE - {"threads", "device"} if self.deterministic else MAY_CHANGE
        for name in given:
            if name not in may_change and getattr(wanted, name) != getattr(self, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} cannot change when a run resumes; "
                    f"it was {getattr(self, name)}. Leave it out, or start a new run in another --out"
                )
        return wanted
