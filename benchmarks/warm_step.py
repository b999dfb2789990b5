"""What reading outputs from the cache adds to a step: a warm step against the same blocks on outputs held in memory.

Knows how to build the two and take turns; the batch is the first that a run on the review data trains on.
"""

import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from benchmarks.forward_rows import BATCH, DTYPE, reviews
from benchmarks.place import Place
from benchmarks.results import Figure, Outcome, Target
from edge_client.assemble import connect
from edge_client.attaching import attach
from edge_client.cached import Outputs, Row
from edge_client.config import TrainConfig
from edge_client.edge_flops import count_edge_flops
from edge_client.edge_model import EdgeModel
from edge_client.step import Stepper
from edge_client.tuning import Tuning
from isthmus.blocks import BlockList
from isthmus.cut import Cut
from isthmus.ledger.flops import ModelFlops
from isthmus.ledger.record import Ledger
from isthmus.load import DTYPES, load_ends
from isthmus.training.batches import batch_at
from isthmus.training.collate import Batch
from isthmus.training.data import read_examples
from isthmus.training.optimizer import Optimizer
from isthmus.training.outputs import select_outputs

NAME = "warm-step"
CUTS = ("0:4", "4:4")
MOST_RATIO = 1.05
RATE = 1e-4

METHOD = (
    f"A step of `--train top` with a batch of {BATCH} rows whose span outputs are in the cache, on an edge that is "
    "connected to a `cloud_node serve` process, against a step of the same top blocks, head, adapters and optimizer "
    f"on the same outputs held in memory. Both stand in one process, in {DTYPE}, and take turns, in either order; a "
    "step is forward, backward and the optimizer's update, and the warm one also reads the batch's rows, from files "
    "that the system holds in memory, and checks them."
)


class Held(nn.Module):
    """Stands where a span was: whatever comes, the outputs that were given."""

    def __init__(self, found: BlockList, hidden_BTD: torch.Tensor) -> None:
        super().__init__()
        self._found = found
        self._hidden_BTD = hidden_BTD

    def forward(self, *_: Any, **__: Any) -> Any:
        """The outputs, as a block of this family would return them."""
        return self._found.result(self._hidden_BTD)


class Side:
    """One of the two: training steps on one batch, the seconds and the loss of each."""

    def __init__(self, edge: EdgeModel, tuning: Tuning, flops: ModelFlops, ledger: Ledger, batch: Batch) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._batch = batch
        self._optimizer = Optimizer(tuning.trainable, 1.0)
        self._stepper = Stepper(edge, tuning, ledger, flops, 1)

    def step(self) -> None:
        """Forward, backward, update."""
        began = time.perf_counter()
        found = self._stepper.gradients([self._batch])
        self._optimizer.step(found.by_name, RATE)
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(found.loss)


def measure(place: Place) -> Outcome:
    """Both in turns for each cut, after one step that is not counted and fills the cache.

    Raises:
        RuntimeError: the two did not compute the same, or a warm step was not warm.
    """
    torch.set_num_threads(place.threads)
    figures: dict[str, Figure] = {}
    for cut in CUTS:
        with place.node(DTYPE, cut) as address, TemporaryDirectory(dir=place.directory) as cache:
            warm, held, reading = _take_turns(_settings(place, address, cut, Path(cache)), place)
        figures |= {
            f"{cut}: warm step": Figure.of(warm, "s"),
            f"{cut}: outputs held in memory": Figure.of(held, "s"),
            f"{cut}: reading and checking the batch's rows, measured alone": Figure.of(reading, "s"),
            f"{cut}: ratio": Figure.of([one / other for one, other in zip(warm, held, strict=True)], "times"),
        }
    return Outcome(figures, tuple(_target(cut, figures) for cut in CUTS))


def _settings(place: Place, address: str, cut: str, cache: Path) -> TrainConfig:
    return TrainConfig(
        method="split",
        train="top",
        cut=cut,
        server=address,
        certs=place.edge_certs,
        data=reviews().train,
        targets=["all-linear"],
        codec="bf16",
        cache=cache,
        dtype=DTYPE,
    )


def _take_turns(config: TrainConfig, place: Place) -> tuple[list[float], list[float], list[float]]:
    ledger = Ledger()
    edge = connect(config, ledger, lambda *_: None)
    try:
        batch = _batch(config, edge)
        tuning = attach(edge.model, edge.found, edge.cut, config.placement)
        flops = count_edge_flops(edge, tuning)
        warm = Side(edge, tuning, flops, ledger, batch)
        near = _near(edge, config, place.model, _filled(edge, warm))
        held = Side(near, attach(near.model, near.found, near.cut, config.placement), flops, Ledger(), batch)
        held.step()
        fetched, reading = ledger.total("train", "fetched_rows"), []
        for turn in range(place.repeats):
            for side in (held, warm) if turn % 2 else (warm, held):
                side.step()
            reading.append(_read(edge.cached_outputs(), batch))
    finally:
        edge.close()
    if ledger.total("train", "fetched_rows") != fetched:
        raise RuntimeError("a warm step asked the cloud for rows")
    if not all(math.isclose(one, other, rel_tol=1e-2) for one, other in zip(warm.losses, held.losses, strict=True)):
        raise RuntimeError(f"the two steps differ: losses {warm.losses} from the cache, {held.losses} from memory")
    return warm.seconds[1:], held.seconds[1:], reading


def _read(outputs: Outputs, batch: Batch) -> float:
    """Seconds to get the batch's rows from the cache."""
    lengths = batch.attention_mask_BT.sum(1).tolist()
    rows = [Row(tuple(ids[:length])) for ids, length in zip(batch.input_ids_BT.tolist(), lengths, strict=True)]
    began = time.perf_counter()
    outputs.of(rows)
    return time.perf_counter() - began


def _batch(config: TrainConfig, edge: EdgeModel) -> Batch:
    examples = read_examples(config.data, edge.tokenizer, edge.longest(config.max_length)).examples
    lengths = tuple(len(example.train.ids) for example in examples)
    return Batch.of([examples[row].train for row in batch_at(lengths, BATCH, config.seed, 0)])


def _filled(edge: EdgeModel, warm: Side) -> torch.Tensor:
    """What the span returns for the batch, [B, T, D], caught while the first step fills the cache."""
    caught: list[Any] = []
    span = edge.found.blocks[edge.cut.bottom]
    handle = span.register_forward_hook(lambda _, __, output: caught.append(output))
    warm.step()
    handle.remove()
    hidden_BTD: torch.Tensor = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    return hidden_BTD


def _near(edge: EdgeModel, config: TrainConfig, model: Path, hidden_BTD: torch.Tensor) -> EdgeModel:
    """The blocks above the span and the head alone, on `hidden_BTD`; the stem's embeddings are run and not used."""
    cut = Cut(0, edge.cut.top)
    loaded, found = load_ends(model, cut, DTYPES[config.dtype])
    found.blocks[0] = Held(found, hidden_BTD)
    select_outputs(loaded)
    return EdgeModel(loaded, found, cut, edge.tokenizer, edge.name, edge.digest, edge.span_dtype)


def _target(cut: str, figures: dict[str, Figure]) -> Target:
    ratio = figures[f"{cut}: ratio"]
    met = ratio.value <= MOST_RATIO
    held = figures[f"{cut}: outputs held in memory"].value
    added = 1000 * (figures[f"{cut}: warm step"].value - held)
    read = 1000 * figures[f"{cut}: reading and checking the batch's rows, measured alone"].value
    reason = f"{added:.1f} ms on top of {1000 * held:.0f} ms, of which reading and checking the rows is {read:.1f} ms"
    text = f"a warm step at {cut} takes at most {MOST_RATIO} times one of the same top blocks"
    return Target(text, str(ratio), met, None if met else reason)
