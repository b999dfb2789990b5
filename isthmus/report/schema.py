"""`run.json`: every field of a run's report, its limits, and how it is read and saved.

Knows the fields and the file; measures nothing and formats nothing. A figure that does not exist is null.
"""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from isthmus.durable import write_whole
from isthmus.errors import RunError
from isthmus.report.interval import wilson

SCHEMA: Final = "isthmus-run/1"
FILE_NAME: Final = "run.json"


def _utc(time: datetime) -> datetime:
    if time.utcoffset() != timedelta(0):
        raise ValueError("the time is not in UTC")
    return time


Count: TypeAlias = Annotated[int, Field(ge=0)]
Amount: TypeAlias = Annotated[float, Field(ge=0)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Change: TypeAlias = Annotated[float, Field(ge=-1, le=1)]
Digest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PortName: TypeAlias = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]*)(\.[A-Za-z0-9_]+)+$")]
Time: TypeAlias = Annotated[AwareDatetime, AfterValidator(_utc)]


class Block(BaseModel):
    """Part of a report: strict, frozen, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True)


class Tokens(Block):
    """Tokens trained on, without padding, and positions computed for them, with it."""

    real: Count
    padded: Count


class Score(Block):
    """One evaluation: mean loss in nats per token that carries loss; accuracy with its 95 % interval."""

    loss: Amount | None
    accuracy: Share | None
    correct: Count | None = None
    accuracy_interval: tuple[Share, Share] | None = None

    @classmethod
    def of(cls, loss: float, correct: Sequence[bool]) -> Self:
        """The loss, and the accuracy of the rows that have choices: whether each was answered right."""
        if not correct:
            return cls(loss=loss, accuracy=None)
        right = sum(correct)
        interval = wilson(right, len(correct))
        return cls(loss=loss, accuracy=right / len(correct), correct=right, accuracy_interval=interval)

    def in_words(self) -> str:
        """Accuracy, where there is one, and loss, for a terminal."""
        low, high = self.accuracy_interval or (0.0, 0.0)
        accuracy = f"accuracy {self.accuracy:.3f} (95 % {low:.3f} to {high:.3f}), " if self.accuracy_interval else ""
        return f"{accuracy}loss {self.loss:.4f} nats per token"


class Evaluation(Block):
    """Scores before and after training on the same rows; `paired` is the 95 % interval of the accuracy's rise."""

    rows: Count | None
    before: Score
    after: Score
    paired: tuple[Change, Change] | None = None


class Params(Block):
    """Parameter counts; `changed`: of the full model, after merging; `stored_bytes`: the adapter's files."""

    trainable: Count | None
    head: Count | None
    changed: Count | None
    rank: Count | None
    stored_bytes: Count | None


class Throughput(Block):
    """Real tokens a second."""

    train_tokens_per_s: Amount | None
    eval_tokens_per_s: Amount | None


class Traffic(Block):
    """Bytes as serialised, gRPC's 5-byte prefix included."""

    up_bytes: Count
    down_bytes: Count


class ByPhase(Block):
    """Traffic of each phase."""

    fetch: Traffic
    train: Traffic
    eval: Traffic
    generate: Traffic
    control: Traffic


class CacheUse(Block):
    """Rows whose span output came from the edge's cache, and rows that were fetched into it."""

    cached_rows: Count
    fetched_rows: Count


class Cache(Block):
    """What the edge's cache of span outputs saved, by phase."""

    train: CacheUse
    eval: CacheUse


class Wire(Block):
    """Traffic of the training steps only, but for `by_phase`; overhead: what was neither tensor nor bundle file.

    `cache` is null where the run had none.
    """

    up_bytes: Count
    down_bytes: Count
    overhead_bytes: Count
    round_trips: Count
    by_phase: ByPhase
    resent_bytes: Count | None = None
    cache: Cache | None = None


class Side(Block):
    """What the training steps took of one side: FLOPs, seconds, peak bytes."""

    forward_flops: Count | None
    backward_flops: Count | None
    forward_s: Amount | None
    backward_s: Amount | None
    peak_tensor_bytes: Count | None
    peak_memory_bytes: Count | None


class Edge(Side):
    """The data owner's side; `wait_s`: waiting for the cloud."""

    wait_s: Amount | None


class Cloud(Side):
    """The model owner's side; `queue_s`: requests waiting their turn; recomputation is part of the forwards."""

    queue_s: Amount | None
    recompute_flops: Count | None = None
    recomputed_calls: Count | None = None


class Cost(Block):
    """What training cost, on the wire and on either side."""

    wire: Wire
    edge: Edge
    cloud: Cloud


class Versions(Block):
    """Versions of what ran on the edge."""

    isthmus: str
    torch: str
    transformers: str
    peft: str | None
    python: str


class Codecs(Block):
    """What tensors were encoded with on the wire, by role; null where nothing of the role crosses."""

    activation: str
    gradient: str | None
    port: str | None = None


class SideNetwork(Block):
    """A network beside the backbone: `reduction` times narrower, fed by `taps` taps of `tap_width` values a token.

    There is a tap every `tap_every` blocks of the span.
    """

    reduction: Count
    tap_every: Count
    tap_width: Count
    taps: Count


class PortCost(Block):
    """One port in training: steps in which it trained, or was only probed; its adapter's FLOPs on the edge.

    `name` is the block's number in the whole model, a dot, and the module's name in the block.
    """

    name: PortName
    trained_steps: Count
    probed_steps: Count
    edge_forward_flops: Count
    edge_backward_flops: Count

    @property
    def block(self) -> int:
        """The number of its block."""
        return int(self.name.partition(".")[0])


class BlockCost(Block):
    """What crossed for one block's ports in training: part of `cost.wire`."""

    block: Count
    up_bytes: Count
    down_bytes: Count
    round_trips: Count


class Decision(Block):
    """What Kill-and-Revive kept alive once `step` steps were done, as indices into `ports`."""

    step: Count
    alive: tuple[Count, ...]


class KillRevive(Block):
    """Kill-and-Revive: after `warmup` steps with every port, every `period` steps a `share` of them is kept alive.

    `left_edge`: whether adapter values were sent to the cloud, as parking does.
    """

    share: Share
    period: Count
    warmup: Count
    idle: Literal["drop", "park"]
    criterion: Literal["importance", "gradient", "random", "top", "scores"]
    left_edge: bool
    decisions: tuple[Decision, ...]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        steps = [decision.step for decision in self.decisions]
        if steps != sorted(set(steps)):
            raise ValueError("the decisions' steps do not ascend")
        return self


class Ports(Block):
    """Where the edge took part in the span; `kill_revive` is null where every port trained all the time."""

    kind: Literal["lora"]
    ports: tuple[PortCost, ...]
    blocks: tuple[BlockCost, ...]
    kill_revive: KillRevive | None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        decisions = self.kill_revive.decisions if self.kill_revive else ()
        if any(index >= len(self.ports) for decision in decisions for index in decision.alive):
            raise ValueError(f"a decision names a port beyond the {len(self.ports)} there are")
        if sorted({port.block for port in self.ports}) != [cost.block for cost in self.blocks]:
            raise ValueError("the blocks are not those of the ports, in order")
        return self


class Watched(Block):
    """What a look at the true span found after `step` steps on the emulator."""

    step: Count
    loss: Amount
    accuracy: Share | None


class Offsite(Block):
    """The emulator that a run was tuned on.

    `emulator` is its bundle's id, `blocks` how many of the span's it keeps, `gap` by how many nats per token it was
    worse than the model on its owner's text; null where its owner did not measure that. `watched` are looks at the true
    span, for each of which hidden states of `watched_rows` rows were sent.
    """

    emulator: Digest
    method: Literal["drop", "share", "rank", "quant"]
    blocks: Count
    bits: Count | None
    parameters: Count
    span_parameters: Count
    weight_bytes: Count
    flops_per_token: Count
    span_flops_per_token: Count
    distilled_steps: Count
    gap: float | None
    watched_rows: Count | None = None
    watched: tuple[Watched, ...] = ()


class BegunFrom(Block):
    """The earlier run whose adapter a run began with: its method, and the SHA-256 of the adapter's tensors."""

    method: str
    adapter: Digest


class SideCount(Block):
    """One side's own count of the checked streams."""

    sent_bytes: Count
    received_bytes: Count


class Agreement(Block):
    """Both sides' counts of the same streams; streams that broke before they could be compared are unchecked."""

    edge: SideCount
    cloud: SideCount
    equal: bool
    unchecked_streams: Count

    @model_validator(mode="after")
    def _truthful(self) -> Self:
        crossed = (self.cloud.received_bytes, self.cloud.sent_bytes)
        if self.equal != ((self.edge.sent_bytes, self.edge.received_bytes) == crossed):
            raise ValueError("`equal` contradicts the counts")
        return self


class Sample(Block):
    """A text that the tuned model wrote."""

    prompt: str
    text: str


class RunReport(Block):
    """A whole run. The fields without a default are the contract; the others were added to it.

    `train`: which ends of the model train; with `top` no gradient crosses. `adapter` is the SHA-256 of the adapter's
    tensors, `eval_data` that of the file of rows it was scored on.
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
            raise RunError(f"{file} does not exist; name the directory of a run that has ended") from None
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
        raise RunError(f"{file} is not JSON ({error}); restore it or run again") from None
    version = found.get("schema") if isinstance(found, dict) else None
    if version != SCHEMA:
        raise RunError(f"{file} has schema {version!r}; this version of isthmus reads {SCHEMA!r}")


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'the whole'}: {problem['msg']}"
