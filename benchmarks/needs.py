"""What a method needs of the cloud, of an edge and of the line between them, by arithmetic.

Knows formulas, and what was measured elsewhere; measures nothing. What is assumed stands in `benchmarks.setting`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

from benchmarks.results import latest
from benchmarks.setting import Setting
from benchmarks.shapes import BFLOAT16, Shape
from cloud_node.activations import SMALL_GRAPH
from isthmus.emulated.forms import GROUP

HOUR = 3600
INT8 = 1 + BFLOAT16 / GROUP
"""Bytes of a weight in 8 bits and of a value in codec int8: itself, and its share of a bfloat16 scale for 64 of them.

`cloud_node serve --quantize int8` has a scale for a whole row and takes less: it is reckoned as the emulators' weights.
"""


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
        flag: the command and flag that ask for it, where its name does not say.
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
    flag: str = ""


def split(shape: Shape) -> Method:
    """Hidden states and gradients, up and down: 4d."""
    return Method("`split`", 1, 1, 1, 1, 2 * shape.hidden, 2 * shape.hidden, kept=True)


def split_again(shape: Shape) -> Method:
    """Nothing is kept: the input comes again beside the gradient, and the forward runs twice."""
    flag = "cloud_node serve --activation-budget 0"
    return replace(split(shape), name="`split`, nothing kept", forwards=2, up=3 * shape.hidden, kept=False, flag=flag)


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


@cache
def measured(column: str) -> float:
    """Of a column in docs/benchmarks.md: what Kill-and-Revive with an eighth of the ports has, of all ports'."""
    rows = latest()
    kept, whole = (rows[f"dlora/{name}:0"].outcome.figures[column].value for name in ("kr-1/8", "all"))
    return kept / whole


@cache
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
    def line(self) -> float:
        """Seconds of a step that the edge's line takes, round trips included."""
        crossing = self.setting.step_tokens * (self.up + self.down) / self.setting.link
        return crossing + self.setting.delay * self.method.trips

    @property
    def step(self) -> float:
        """Seconds of a step that waits for nobody else: both sides' computing, and the line."""
        computing = self.edge_flops / self.setting.edge + self.flops / self.setting.computing
        return self.setting.step_tokens * computing + self.line

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
            return "the edge's line" if self.line > self.step / 2 else "the edge's computing"
        return min(self.capacity, key=lambda bound: self.capacity[bound])

    @property
    def sessions(self) -> float:
        """That a replica admits: each that keeps has room for a small graph (`cloud_node.activations`)."""
        return self.room // (SMALL_GRAPH * self.kept) if self.kept else float("inf")

    def replicas(self, edges: int) -> int:
        """That admit `edges` edges, and compute and hold what they send."""
        by_rate = self.rate(edges) / min(self.capacity["computing"], self.capacity["memory"])
        return ceil(max(by_rate, edges / self.sessions))

    def front_ends(self, edges: int) -> int:
        """That carry it."""
        return ceil(self.rate(edges) / self.capacity["front end"])

    def kept_bytes(self, edges: int) -> float:
        """What waits for backwards on all replicas (Little's law)."""
        return self.rate(edges) * self.held * self.kept

    def gpu_bytes(self, edges: int) -> float:
        """Weights of all replicas, and what waits for backwards."""
        return self.replicas(edges) * self.weights + self.kept_bytes(edges)
