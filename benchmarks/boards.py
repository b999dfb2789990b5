"""What small boards would make of an edge: extrapolated from one machine's figures and vendors' data, tried on none.

Knows boards, shapes, arithmetic, and how near it comes to what was measured; measures nothing.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results import Figure
from benchmarks.shapes import BFLOAT16, FLOAT32, LLAMA_8B, LLAMA_70B, SMOLLM2, Shape
from isthmus.planning.machines import DESKTOP, HEADLESS, PHONE, Board

HELD, TRAINS = "parameters held", "of them training"
IMPORTED, LOADED, LOADING = "after imports", "after loading", "peak of loading"
STEPPING, TENSORS = "peak of steps", "of it, tensors"
STEP, COMPUTING, WAITING = "a step", "edge computing", "waiting"
COMPUTED, SPEED = "edge computes", "at"
PRODUCT = "matrix-product"

RANK = 8
REACHED = 0.4
"""Of a board's peak, what a large matrix product reaches: High-Performance Linpack reached 0.39 on a Raspberry Pi 5
and 0.48 on a Compute Module 4 (github.com/geerlingguy/top500-benchmark, issues 18 and 33), in double precision."""

AT_WORK = 2
"""Further copies of the logits while the loss goes backward: the gradients of it and of them."""

ROOMS = {f"a board of {memory} GB": memory * 1e9 - HEADLESS for memory in (1, 2, 4, 8)}
ROOMS |= {"a laptop of 8 GB": 8e9 - DESKTOP, "a phone of 8 GB": 8e9 - PHONE}
"""Bytes that are left for an edge, by what it runs on."""


@dataclass(frozen=True)
class Edge:
    """An edge on paper: LoRA of rank 8 on q and v of its blocks, one batch."""

    shape: Shape
    cut: str
    rows: int
    tokens: int
    lossy: int
    value: int

    @property
    def blocks(self) -> int:
        """Of the model, on the edge."""
        return sum(map(int, self.cut.split(":")))

    @property
    def weights(self) -> int:
        """Bytes of the ends."""
        return self.shape.ends(self.blocks) * self.value

    @property
    def trained(self) -> int:
        """Bytes of adapters, gradients, float32 masters where they are not float32, and AdamW's two moments."""
        masters = 0 if self.value == FLOAT32 else FLOAT32
        return self.shape.lora(RANK, self.blocks) * (2 * self.value + masters + 2 * FLOAT32)

    @property
    def kept(self) -> float:
        """Bytes that autograd keeps by formula: of the blocks, and of the logits, which are float32 in the loss."""
        return self.rows * self.tokens * self.blocks * self.shape.kept_bytes(self.value) + self.logits

    @property
    def logits(self) -> int:
        """Bytes of the logits."""
        return self.rows * self.lossy * self.shape.vocabulary * FLOAT32

    @property
    def flops(self) -> float:
        """Of a step: both passes of the blocks, and of the output layer where there is loss."""
        block = self.shape.forward_flops(self.tokens) + self.shape.backward_flops(self.tokens)
        head = 4 * self.rows * self.lossy * self.shape.embedding
        return self.rows * self.tokens * self.blocks * block + head


REFERENCE = Edge(SMOLLM2, "2:2", 8, 128, 1, FLOAT32)
EDGES = (
    REFERENCE,
    Edge(SMOLLM2, "2:2", 8, 128, 1, BFLOAT16),
    Edge(SMOLLM2, "2:2", 1, 128, 1, BFLOAT16),
    Edge(LLAMA_8B, "0:0", 1, 256, 64, BFLOAT16),
    Edge(LLAMA_8B, "1:1", 1, 256, 64, BFLOAT16),
    Edge(LLAMA_70B, "0:0", 1, 256, 64, BFLOAT16),
    Edge(LLAMA_70B, "1:1", 1, 256, 64, BFLOAT16),
)

Found = Mapping[str, Mapping[str, Figure]]
"""Figures of the measured cases by their names."""

Cases = Mapping[str, Edge]
"""Measured cases as they are on paper, by their names."""


@dataclass(frozen=True)
class Spread:
    """Between what measured figures lie, mostly as shares of extrapolated ones."""

    low: float
    high: float

    @classmethod
    def of(cls, figure: Figure, whole: float = 1) -> "Spread":
        """Of a figure's repeats, as shares of `whole`."""
        low = figure.value if figure.low is None else figure.low
        high = figure.value if figure.high is None else figure.high
        return cls(low / whole, high / whole)

    @classmethod
    def over(cls, several: Sequence["Spread"]) -> "Spread":
        """What they span together."""
        return cls(min(each.low for each in several), max(each.high for each in several))

    def times(self, other: "Spread") -> "Spread":
        """Of two factors together, each anywhere within its own."""
        return Spread(self.low * other.low, self.high * other.high)

    def around(self, value: float, said: Callable[[float], str]) -> str:
        """An extrapolated figure, and between what it would lie."""
        return f"{said(value)} ({said(self.low * value)} to {said(self.high * value)})"


def beyond(several: Sequence[Spread]) -> float:
    """How many times further out than all others one lies at most, each being left out once."""
    furthest = 1.0
    for number, one in enumerate(several):
        others = Spread.over([*several[:number], *several[number + 1 :]])
        furthest = max(furthest, others.low / one.low, one.high / others.high)
    return furthest


def kept_factor(found: Found) -> float:
    """What autograd kept in the measured case, of what the formula says: adapters keep their inputs as well."""
    edge = REFERENCE
    return (found["float32"][TENSORS].value * 1e6 - edge.weights - edge.trained) / edge.kept


def working(found: Found) -> float:
    """Bytes at the peak of steps that are neither imports nor tensors that stay: the median of the measured cases."""
    cases = [figures for name, figures in found.items() if name != PRODUCT]
    return 1e6 * statistics.median(each[STEPPING].value - each[IMPORTED].value - each[TENSORS].value for each in cases)


def step_speed(found: Found) -> float:
    """FLOP/s of the reference's steps here, in float32 on one thread."""
    return found["float32"][SPEED].value * 1e9


def product_speed(found: Found) -> float:
    """FLOP/s that a matrix product reaches here: the best of its repeats, for what disturbs one only slows it."""
    return Spread.of(found[PRODUCT]["float32"]).high * 1e9


def efficiency(found: Found) -> float:
    """What a step reached here of a matrix product's speed."""
    return step_speed(found) / product_speed(found)


def memory(edge: Edge, found: Found) -> float:
    """Bytes of the whole process at its peak."""
    tensors = edge.weights + edge.trained + edge.kept * kept_factor(found)
    return found["float32"][IMPORTED].value * 1e6 + tensors + AT_WORK * edge.logits + working(found)


def seconds(edge: Edge, board: Board, found: Found) -> float:
    """Of the edge's own computing in a step, in float32's speed on all cores."""
    return edge.flops / (board.peak * REACHED * efficiency(found))


def seconds_here(edge: Edge, found: Found) -> float:
    """The same where it was measured, on one thread: no product is in it."""
    return edge.flops / step_speed(found)


def memory_shares(found: Found, cases: Cases) -> list[Spread]:
    """What was measured of what is extrapolated, of all cases but the reference, which gave a factor."""
    others = {name: edge for name, edge in cases.items() if edge != REFERENCE}
    return [Spread.of(found[name][STEPPING], memory(edge, found) / 1e6) for name, edge in others.items()]


def seconds_shares(found: Found, cases: Cases) -> list[Spread]:
    """The same of those in float32, from the fastest to the slowest repeat: boards are given its speed alone."""
    others = {name: edge for name, edge in cases.items() if edge != REFERENCE and edge.value == FLOAT32}
    return [Spread.of(found[name][COMPUTING], seconds_here(edge, found)) for name, edge in others.items()]


def product_shares(found: Found, cases: Cases) -> Spread:
    """What the product may be of its best: its slowest repeat, or the fastest step, for no step is faster than it."""
    fastest = step_speed(found) / Spread.over(seconds_shares(found, cases)).low
    repeats = Spread.of(found[PRODUCT]["float32"], product_speed(found) / 1e9)
    return Spread(max(repeats.low, fastest / product_speed(found)), repeats.high)


def fitting(edge: Edge, room: float, found: Found, spread: Spread) -> str:
    """Whether an edge fits into so many bytes, if what it takes lies within the spread."""
    expected = memory(edge, found)
    if spread.high * expected <= room:
        return "fits"
    return "no" if spread.low * expected > room else "too close to tell"
