"""What small boards would make of an edge: extrapolated from one machine's figures and vendors' data, tried on none.

Knows boards, shapes and arithmetic; measures nothing.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.results import Figure
from benchmarks.shapes import BFLOAT16, FLOAT32, LLAMA_8B, LLAMA_70B, SMOLLM2, Shape
from benchmarks.tables import short, size, table

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

SYSTEM = 0.5e9
"""Bytes that the operating system is left."""


@dataclass(frozen=True)
class Board:
    """A device as its vendor describes it: FLOPs in float32, bytes."""

    name: str
    cores: str
    peak: float
    memory: float
    source: str


ARM = "Arm's optimisation guide"
BOARDS = (
    Board("Raspberry Pi 4", "4 Cortex-A72 at 1.5 GHz, 8 FLOP a cycle", 4 * 1.5e9 * 8, 4e9, f"raspberrypi.com; {ARM}"),
    Board("Raspberry Pi 5", "4 Cortex-A76 at 2.4 GHz, 16", 4 * 2.4e9 * 16, 8e9, f"raspberrypi.com; {ARM}"),
    Board("Phone, Snapdragon 8 Gen 2", "1 at 3.2, 4 at 2.8 GHz, 16", (3.2e9 + 4 * 2.8e9) * 16, 8e9, "qualcomm.com"),
    Board("Laptop of 2017, Core i5-8250U", "4 at 1.6 GHz, 32", 4 * 1.6e9 * 32, 8e9, "ark.intel.com"),
    Board("Jetson Orin Nano, its GPU", "1,024 CUDA cores at 625 MHz, 2", 1024 * 625e6 * 2, 8e9, "NVIDIA's data sheet"),
)


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
    Edge(LLAMA_8B, "0:0", 1, 256, 64, BFLOAT16),
    Edge(LLAMA_8B, "1:1", 1, 256, 64, BFLOAT16),
    Edge(LLAMA_70B, "0:0", 1, 256, 64, BFLOAT16),
    Edge(LLAMA_70B, "1:1", 1, 256, 64, BFLOAT16),
)

Found = Mapping[str, Mapping[str, Figure]]
"""Figures of the measured cases by their names."""


def kept_factor(found: Found) -> float:
    """What autograd kept in the measured case, of what the formula says: adapters keep their inputs as well."""
    edge = REFERENCE
    return (found["float32"][TENSORS].value * 1e6 - edge.weights - edge.trained) / edge.kept


def working(found: Found) -> float:
    """Bytes at the peak of steps that are neither imports nor tensors that stay: the median of the measured cases."""
    cases = [figures for name, figures in found.items() if name != PRODUCT]
    return 1e6 * statistics.median(each[STEPPING].value - each[IMPORTED].value - each[TENSORS].value for each in cases)


def efficiency(found: Found) -> float:
    """What an edge's step reached here of a matrix product's speed, in float32 on one thread."""
    return found["float32"][SPEED].value / found[PRODUCT]["float32"].value


def memory(edge: Edge, found: Found) -> float:
    """Bytes of the whole process at its peak."""
    tensors = edge.weights + edge.trained + edge.kept * kept_factor(found)
    return found["float32"][IMPORTED].value * 1e6 + tensors + AT_WORK * edge.logits + working(found)


def seconds(edge: Edge, board: Board, found: Found) -> float:
    """Of the edge's own computing in a step, in float32's speed on all cores."""
    return edge.flops / (board.peak * REACHED * efficiency(found))


def tables(found: Found) -> dict[str, str]:
    """What is extrapolated, by the tables' names."""
    return {"ends": _ends(found), "boards": _boards(found), "factors": _factors(found)}


def _named(edge: Edge) -> list[str]:
    dtype = "float32" if edge.value == FLOAT32 else "bfloat16"
    return [edge.shape.name, edge.cut, f"{edge.rows} x {edge.tokens}, loss on {edge.lossy}", dtype]


def _ends(found: Found) -> str:
    rows = []
    for edge in EDGES:
        embeddings = edge.shape.embeddings * edge.value
        parts = [embeddings, edge.weights - embeddings, edge.trained, edge.kept * kept_factor(found)]
        rows.append([*_named(edge), *map(size, (*parts, memory(edge, found))), short(edge.flops / 1e12)])
    heading = ["model", "cut", "batch", "dtype", "embedding and head", "end blocks", "LoRA and AdamW"]
    return table([*heading, "kept for backward", "whole process", "TFLOP a step"], rows)


def _boards(found: Found) -> str:
    models = [f"{edge.shape.name} {edge.cut}, {_named(edge)[-1]}" for edge in EDGES]
    rows = []
    for board in BOARDS:
        cells = [_fitting(edge, board, found) for edge in EDGES]
        rows.append([board.name, board.cores, short(board.peak / 1e9), size(board.memory), board.source, *cells])
    return table(["board", "computing", "peak, GFLOP/s", "memory", "source", *models], rows)


def _fitting(edge: Edge, board: Board, found: Found) -> str:
    fits = memory(edge, found) <= board.memory - SYSTEM
    return f"{short(seconds(edge, board, found))} s" if fits else "does not fit"


def _factors(found: Found) -> str:
    rows = [
        ["kept for backward, of the formula", short(kept_factor(found))],
        ["working memory beside imports and tensors", size(working(found))],
        ["a step's speed, of a matrix product's", short(efficiency(found))],
        ["a matrix product's speed, of a board's peak (assumed)", short(REACHED)],
        ["left to the operating system (assumed)", size(SYSTEM)],
    ]
    return table(["factor", "value"], rows)
