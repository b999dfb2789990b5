"""Distillation: an emulator learns to give out what its span gives out, and the model around it to predict as well.

Knows a pair, rows of tokens, and the order of things: step, curve, checkpoint. Knows no files but checkpoints, and
nothing of how an emulator was built. The aim is that of Offsite-Tuning (Xiao, Lin and Han, 2023, arXiv 2302.04870).
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash
from rich.console import Console

from emulator.costs import Costs
from emulator.pair import Compared, Pair
from emulator.trained import TrainedWeights
from isthmus.emulated.recipe import CurvePoint, Distance
from isthmus.errors import InterruptedRunError, ModelError, RunError, UsageError
from isthmus.faults import Fault, passing
from isthmus.training.batches import batch_at
from isthmus.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from isthmus.training.optimizer import rate_at
from isthmus.training.progress import meter
from isthmus.training.stopping import stopping

CHECKPOINT_EVERY = 50

POINTS = 50
"""Of a curve at most, the first and the last included."""

HELD_OUT_POINTS = 5
"""Of those at most, where the held-out distance is measured: that takes its time."""


@dataclass(frozen=True)
class DistilPlan:
    """What is minimised, on which batches and at which rate: cosine from `lr` after a linear warm-up.

    Attributes:
        steps, batch_size: batches, and rows in each.
        weight_hidden: of the distance of output hidden states.
        weight_loss: of the language-model loss, in nats per counted token.
    """

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    seed: int
    weight_hidden: float = 30.0
    weight_loss: float = 1.0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "warmup_steps": 0, "seed": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"{name} of a distillation must be at least {lowest}, not {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"lr of a distillation must be above 0 and finite, not {self.lr}")


def distil(
    pair: Pair,
    rows: Sequence[TokenSequence],
    plan: DistilPlan,
    checkpoints: Path,
    resume: bool,
    console: Console,
    measure: Callable[[], Distance],
    costs: Costs | None = None,
) -> tuple[CurvePoint, ...]:
    """Train the emulator of a pair, whose forms are filled; the model and the ends stay as they are, bit by bit.

    Repeated blocks are put in if they were not, and stand in the twin afterwards. A point of the curve is the mean
    since the one before it; that of step 0 is of the first batch.

    Args:
        pair: whose twin's kept blocks are un-shared from the model and trained.
        rows: the owner's public text.
        plan: how.
        checkpoints: folder that no other distillation has; one is written every 50 steps, and on Ctrl-C.
        resume: go on from the newest checkpoint, bit by bit as if it had never stopped; without one, begin.
        console: where progress is shown.
        measure: the pair's distance on held-out text, as it is when called; called 5 times at most.
        costs: counts what is spent.

    Returns:
        The whole curve, the part before a resumption included.

    Raises:
        InterruptedRunError: stopped by the user after a whole step; a checkpoint is written.
        ModelError: the loss or its gradient is no longer finite.
        RunError: the checkpoint is of another distillation or damaged, or none can be written.
        UsageError: there are no rows.
    """
    return _Distillation(pair, rows, plan, checkpoints, console, measure, costs or Costs(pair)).carry_out(resume)


class _Distillation:
    """One distillation, from where it begins or goes on to its last step."""

    def __init__(
        self,
        pair: Pair,
        rows: Sequence[TokenSequence],
        plan: DistilPlan,
        checkpoints: Path,
        console: Console,
        measure: Callable[[], Distance],
        costs: Costs,
    ) -> None:
        self._pair = pair
        self._rows = rows
        self._plan = plan
        self._checkpoints = checkpoints
        self._console = console
        self._measure = measure
        self._costs = costs
        self._lengths = tuple(len(row.ids) for row in rows)
        self._weights = TrainedWeights(pair)
        self._points = _spread(range(plan.steps + 1), POINTS)
        self._measured = _spread(self._points, HELD_OUT_POINTS)
        self._step = 0
        self._curve: list[CurvePoint] = []
        self._recent: list[tuple[float, float]] = []  # loss and distance of the steps since the last point

    def carry_out(self, resume: bool) -> tuple[CurvePoint, ...]:
        """Do what is left to do."""
        checkpoint = load_checkpoint(self._checkpoints) if resume else None
        self._made_of = _made_of(self._pair, self._rows, self._plan)
        if checkpoint is not None:
            self._restore(checkpoint)
        self._costs.memory.hold("training", self._weights.held_bytes)
        with stopping() as self._asked, self._weights.training(), self._costs.stage("distil"):
            self._work()
        self._costs.memory.hold("training", 0)
        return tuple(self._curve)

    def _work(self) -> None:
        if not self._curve:
            batch = self._batch()
            with torch.no_grad(), self._costs.seconds("distil", "cloud_forward_s"):
                self._note(self._pair.compare(batch))
            self._costs.compared("distil", batch)
            self._close_step()
        with meter(self._console, "distil", self._plan.steps, self._step) as progress:
            while self._step < self._plan.steps:
                self._take_step()
                loss, hidden = self._recent[-1]
                progress.update(self._step, f"loss {loss:.3f}  distance {hidden:.4f}  of the training batch")
                self._close_step()

    def _batch(self) -> Batch:
        rows = batch_at(self._lengths, self._plan.batch_size, self._plan.seed, self._step)
        return Batch.of([self._rows[row] for row in rows])

    def _take_step(self) -> None:
        plan, costs, batch = self._plan, self._costs, self._batch()
        with costs.seconds("distil", "cloud_forward_s"), costs.memory.saving():
            compared = self._pair.compare(batch)
            self._note(compared)
            aim = plan.weight_hidden * compared.hidden + plan.weight_loss * compared.loss
        with costs.seconds("distil", "cloud_backward_s"):
            gradients = self._weights.gradients(aim)
        with costs.seconds("distil", "cloud_update_s"):
            norm = self._weights.step(gradients, self._rate())
        costs.compared("distil", batch, backward=True)
        if not math.isfinite(norm):
            raise ModelError(f"the gradient is {norm} at step {self._step + 1} of the distillation; lower --lr")
        self._step += 1

    def _rate(self) -> float:
        return rate_at(self._step, self._plan.steps, self._plan.lr, "cosine", self._plan.warmup_steps)

    def _note(self, compared: Compared) -> None:
        loss, hidden = float(compared.loss.detach()), float(compared.hidden.detach())
        if not math.isfinite(loss + hidden):
            remedy = "lower --lr" if self._step else "give it more blocks, more ranks or more bits"
            raise ModelError(
                f"the emulator's loss is {loss + hidden} after {self._step} steps of distillation; {remedy}"
            )
        self._recent.append((loss, hidden))

    def _close_step(self) -> None:
        """What a whole step is followed by: a point of the curve, the costs, a checkpoint, a look whether to stop."""
        if self._step in self._points:
            self._add_point()
        self._costs.close_step(self._step)
        passing(Fault.DISTIL_AFTER_STEP)
        if self._asked or self._step % CHECKPOINT_EVERY == 0 or self._step == self._plan.steps:
            self._save()
        if self._asked:
            raise InterruptedRunError(
                f"stopped after step {self._step} of the distillation; go on with the same command and --resume"
            )

    def _add_point(self) -> None:
        loss, hidden = (math.fsum(values) / len(self._recent) for values in zip(*self._recent, strict=True))
        held_out = None
        if self._step in self._measured:
            with torch.no_grad():
                held_out = self._measure().hidden
        self._curve.append(CurvePoint(step=self._step, loss=loss, hidden=hidden, held_out=held_out))
        self._recent.clear()

    def _save(self) -> None:
        curve = [point.model_dump() for point in self._curve]
        facts = {"made_of": self._made_of, "curve": curve, "recent": self._recent}
        try:
            save_checkpoint(self._checkpoints, Checkpoint(self._step, self._weights.state(), facts))
        except OSError as error:
            raise RunError(f"no checkpoint can be written ({error.strerror}); free some space and --resume") from None

    def _restore(self, checkpoint: Checkpoint) -> None:
        facts = checkpoint.facts
        for name, digest in self._made_of.items():
            if facts.get("made_of", {}).get(name) != digest:
                raise RunError(
                    f"the {name} is not what this distillation began with; resume with the same, or begin anew"
                )
        self._step = checkpoint.step
        self._curve = [CurvePoint.model_validate(point) for point in facts["curve"]]
        self._recent = [(loss, hidden) for loss, hidden in facts["recent"]]
        self._weights.load(checkpoint.tensors)


def _spread(numbers: Sequence[int], most: int) -> tuple[int, ...]:
    """At most `most` of the numbers, evenly, the first and the last among them."""
    count = min(most, len(numbers))
    return tuple(numbers[round(index * (len(numbers) - 1) / (count - 1))] for index in range(count))


def _made_of(pair: Pair, rows: Sequence[TokenSequence], plan: DistilPlan) -> dict[str, str]:
    """What decides a distillation and stands in no checkpoint; what goes on must find the same."""
    text = hashlib.sha256()
    for row in rows:
        text.update(repr((row.ids, row.counted)).encode())
    buffers = (tensor for number in pair.recipe.kept for tensor in pair.twin_found.blocks[number].buffers())
    return {
        "plan": json.dumps(asdict(plan)),
        "recipe": pair.recipe.model_dump_json(),
        "text": text.hexdigest(),
        "model": _digest(pair.model.parameters()),
        "rounding of weights to whole numbers": _digest(buffers),
    }


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """Of their bytes; against mistakes, not against enemies."""
    total = xxhash.xxh3_128()
    for tensor in tensors:
        total.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return str(total.hexdigest())
