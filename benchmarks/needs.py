"""What a method needs of the cloud, of an edge and of the line between them, by arithmetic.

Knows formulas, and what was measured elsewhere; measures nothing. What is assumed stands in `Setting`, one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from benchmarks.results import latest
from benchmarks.shapes import BFLOAT16, Shape
from cloud_node.activations import SMALL_GRAPH

HOUR = 3600
INT8 = 1 + 2 / 64
"""Bytes of a value in codec int8, and of a weight in 8 bits: itself, and its share of a bfloat16 scale for 64."""


def _given(value: float, said: str) -> Any:
    return field(default=value, metadata={"said": said})


@dataclass(frozen=True)
class Setting:
    """What is assumed, in seconds, bytes and FLOP/s; what each means stands beside it."""

    rows: float = _given(8, "rows of a step")
    tokens: float = _given(256, "real tokens of a row")
    loss_share: float = _given(0.25, "of the tokens, those that carry loss: a completion after its prompt")
    steps_per_hour: float = _given(60, "steps an hour that an edge wants, day and night")
    epochs: float = _given(3, "epochs; what is cached crosses in the first")
    link: float = _given(100e6 / 8, "bytes/s of an edge's line each way: 100 Mbit/s, as in benchmarks.md")
    delay: float = _given(0.05, "seconds of a round trip, as in benchmarks.md")
    edge: float = _given(1e12, "FLOP/s that an edge reaches: a laptop's GPU; devices.md has smaller ones")
    gpus: int = _given(4, "H100 SXM in a replica")
    peak: float = _given(989e12, "FLOP/s of one in bfloat16, dense (NVIDIA's data sheet)")
    utilisation: float = _given(0.4, "of that, what is reached: not measured")
    memory: float = _given(80e9, "bytes of its memory (the same)")
    usable: float = _given(0.9, "of that, what weights and activations may take: not measured")
    bandwidth: float = _given(3.35e12, "bytes/s that it reads (the same)")
    weight_bytes: float = _given(BFLOAT16, "bytes of a weight of the span")
    value_bytes: float = _given(BFLOAT16, "bytes of a value that crosses")

    @property
    def step_tokens(self) -> float:
        """Of one edge."""
        return self.rows * self.tokens

    @property
    def computing(self) -> float:
        """FLOP/s that a replica reaches."""
        return self.gpus * self.peak * self.utilisation


@dataclass(frozen=True)
class Method:
    """What a method asks of the cloud and of the line, per token of a step and averaged over the epochs.

    Attributes:
        bottom: blocks on the edge below the span.
        top: blocks on the edge above it.
        forwards: passes through the span.
        backwards: passes back.
        up: values that cross.
        down: values that cross.
        kept: whether what autograd saved waits on the cloud for the backward.
        trips: round trips of a step.
    """

    name: str
    bottom: int
    top: int
    forwards: float
    backwards: float
    up: float
    down: float
    kept: bool = False
    trips: float = 2


def split(shape: Shape) -> Method:
    """Hidden states and gradients, up and down: 4d."""
    return Method("`split`", 1, 1, 1, 1, 2 * shape.hidden, 2 * shape.hidden, kept=True)


def split_again(shape: Shape) -> Method:
    """Nothing is kept: the input comes again beside the gradient, and the forward runs twice."""
    return replace(split(shape), name="`split`, nothing kept", forwards=2, up=3 * shape.hidden, kept=False)


def top(shape: Shape, setting: Setting) -> Method:
    """Hidden states up and down once per row, in the first epoch."""
    once = 1 / setting.epochs
    return Method("`split --train top`", 0, 2, once, 0, once * shape.hidden, once * shape.hidden, trips=once)


def side(shape: Shape, setting: Setting, every: int = 4, width: int = 64) -> Method:
    """As `top`, but what comes back are taps, and the span's output where there is loss."""
    once, taps = 1 / setting.epochs, len(range(shape.blocks - 1 - every, -1, -every))
    down = taps * width + setting.loss_share * shape.hidden
    return Method("`side`", 0, 0, once, 0, once * shape.hidden, once * down, trips=once)


def dlora(shape: Shape, setting: Setting) -> Method:
    """LoRA at q and v of every block: forward the input down and both outputs up, backward the reverse.

    The lowest block sends no gradient of its input; the boundary is the input up, and the output down and its gradient
    up where there is loss.
    """
    ports, lossy = shape.blocks * (2 * shape.hidden + shape.kv), setting.loss_share * shape.hidden
    return Method("`dlora`, all of q and v", 0, 0, 1, 1, ports + lossy, ports + lossy, True, 2 * shape.blocks + 2)


def kill_revive(shape: Shape, setting: Setting) -> Method:
    """As `dlora`, with the shares of bytes and round trips that Kill-and-Revive left of them when it was measured."""
    whole, values, trips = dlora(shape, setting), measured("bytes per real token"), measured("round trips per step")
    crossing = {"up": whole.up * values, "down": whole.down * values, "trips": whole.trips * trips}
    return replace(whole, name="`dlora`, Kill-and-Revive 1/8", **crossing)


def measured(column: str) -> float:
    """Of a column in docs/benchmarks.md: what Kill-and-Revive with an eighth of the ports has, of all ports'."""
    rows = latest()
    kept, whole = (rows[f"dlora/{name}:0"].outcome.figures[column].value for name in ("kr-1/8", "all"))
    return kept / whole


def front_end() -> float:
    """Bytes per second each way through one gRPC front end, as measured on two cores that its client shared."""
    return latest()["throughput-none"].outcome.figures["whole stack, encoded bytes each way"].value * 1e9


@dataclass(frozen=True)
class Need:
    """What one method needs of one edge and of one replica."""

    shape: Shape
    setting: Setting
    method: Method

    @property
    def span(self) -> int:
        """Blocks on the cloud."""
        return self.shape.blocks - self.method.bottom - self.method.top

    @property
    def weights(self) -> float:
        """Bytes of the span, once per replica."""
        return self.span * self.shape.block * self.setting.weight_bytes

    @property
    def flops(self) -> float:
        """Of the cloud, per token."""
        tokens, method = int(self.setting.tokens), self.method
        forward, backward = self.shape.forward_flops(tokens), self.shape.backward_flops(tokens)
        return self.span * (method.forwards * forward + method.backwards * backward)

    @property
    def up(self) -> float:
        """Bytes per token."""
        return self.method.up * self.setting.value_bytes

    @property
    def down(self) -> float:
        """Bytes per token."""
        return self.method.down * self.setting.value_bytes

    @property
    def edge_flops(self) -> float:
        """Of the edge, per token: its blocks both ways, and the output layer both ways where there is loss."""
        tokens = int(self.setting.tokens)
        block = self.shape.forward_flops(tokens) + self.shape.backward_flops(tokens)
        head = 4 * self.setting.loss_share * self.shape.embedding
        return (self.method.bottom + self.method.top) * block + head

    @property
    def step(self) -> float:
        """Seconds of a step that waits for nobody else: both sides' computing, the line, round trips."""
        setting = self.setting
        computing = self.edge_flops / setting.edge + self.flops / setting.computing
        return (
            setting.step_tokens * (computing + (self.up + self.down) / setting.link) + setting.delay * self.method.trips
        )

    @property
    def kept(self) -> float:
        """Bytes per token that wait for the backward."""
        return self.span * self.shape.kept_bytes() if self.method.kept else 0.0

    @property
    def held(self) -> float:
        """Seconds that they wait: the step, less what comes before the forward and after the backward."""
        if not self.method.kept:
            return 0.0
        setting, tokens = self.setting, int(self.setting.tokens)
        bottom = self.shape.forward_flops(tokens) + self.shape.backward_flops(tokens)
        crossings = 1 + (self.method.bottom > 0)  # the hidden states up and, where something below trains, a gradient
        before = self.method.bottom * bottom / setting.edge
        line = crossings * self.shape.hidden * setting.value_bytes / setting.link
        return self.step - setting.step_tokens * (before + line)

    @property
    def steps_per_hour(self) -> float:
        """What an edge wants, or its own computing and its line allow."""
        return min(self.setting.steps_per_hour, HOUR / self.step)

    def rate(self, edges: int) -> float:
        """Tokens per second of `edges` edges."""
        return edges * self.steps_per_hour * self.setting.step_tokens / HOUR

    @property
    def room(self) -> float:
        """Bytes that a replica has beside its weights."""
        return self.setting.gpus * self.setting.memory * self.setting.usable - self.weights

    @property
    def capacity(self) -> Mapping[str, float]:
        """Tokens per second of a replica with one front end, by what bounds them (memory by Little's law)."""
        return {
            "computing": self.setting.computing / self.flops,
            "memory": self.room / (self.kept * self.held) if self.kept else float("inf"),
            "front end": front_end() / max(self.up, self.down),
        }

    @property
    def bottleneck(self) -> str:
        """What is short first, of a replica or, before that, on the edge."""
        if self.steps_per_hour < self.setting.steps_per_hour:
            return "the edge's line"
        return min(self.capacity, key=lambda bound: self.capacity[bound])

    @property
    def sessions(self) -> float:
        """That a replica admits: each that keeps has room for a small graph (`cloud_node.activations`)."""
        graph = SMALL_GRAPH * self.span * self.shape.kept_bytes()
        return self.room // graph if self.method.backwards else float("inf")

    def replicas(self, edges: int) -> int:
        """That admit `edges` edges, and compute and hold what they send."""
        by_rate = self.rate(edges) / min(self.capacity["computing"], self.capacity["memory"])
        return ceil(max(by_rate, edges / self.sessions))

    def front_ends(self, edges: int) -> int:
        """That carry it."""
        return ceil(self.rate(edges) / self.capacity["front end"])

    def gpu_bytes(self, edges: int) -> float:
        """Weights of all replicas, and what waits for backwards."""
        return self.replicas(edges) * self.weights + self.rate(edges) * self.held * self.kept
