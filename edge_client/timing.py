"""How fast this device goes through a model's blocks: real training steps on a few of them, of several sizes.

Knows how to time steps of a short random model with the model's own widths; knows no wire and no file.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedConfig

from edge_client.attaching import attach
from edge_client.edge_flops import count_edge_flops
from edge_client.edge_model import EdgeModel
from edge_client.placement import Placement
from isthmus.architectures import class_of, longest_row, shortened
from isthmus.blocks import find_blocks
from isthmus.cut import Cut
from isthmus.ledger.memory import TensorPeak
from isthmus.planning.fitting import Timed, not_negative, pass_speed, undisturbed
from isthmus.planning.machines import Speed
from isthmus.training.collate import Batch, summed_loss
from isthmus.training.data import TokenSequence
from isthmus.training.optimizer import Optimizer
from isthmus.training.outputs import select_outputs

RANK = 8
BLOCKS = (1, 3)
"""Of the models that are timed: what a call takes and what a block takes are told apart by their difference."""

SIZES = ((1, 16, 1), (1, 64, 1), (4, 64, 1), (8, 128, 1), (8, 256, 1))
"""Rows, tokens of each, and of these those that reach the output layer."""

OUTPUTS = ((1, 32, 32), (2, 128, 128))
"""The same, to tell the output layer from blocks: in the shortest model."""

HEAD_BYTES = 1 << 27
"""Of an output layer that is timed, at most: of a larger vocabulary a part is enough."""

LONGEST_S = 2.0
"""Larger sizes than one whose step took longer are left out."""

ROUNDS = 7
VALUES = 1 << 20
"""Of a parameter whose update is timed."""

Told = Callable[[int, int], None]
"""Told how many steps were timed, and how many there will be."""


class _Timed:
    """One model of so many blocks, and steps of given sizes on it."""

    def __init__(self, configuration: PreTrainedConfig, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        text = configuration.get_text_config()
        vocabulary = min(int(text.vocab_size), max(256, HEAD_BYTES // (int(text.hidden_size) * dtype.itemsize)))
        short = shortened(configuration, blocks, vocabulary)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = class_of(short)(short).to(device, dtype).requires_grad_(False).eval()
        found, cut = find_blocks(model), Cut(0, 0)
        select_outputs(model)
        edge = EdgeModel(model, found, cut, None, "timed", "", str(dtype))
        tuning = attach(model, found, cut, Placement("lora", RANK, 2.0 * RANK, None, 0, in_span=True))
        self.flops = count_edge_flops(edge, tuning)
        self.blocks, self._vocabulary = blocks, vocabulary
        self._model, self.trainable = tuning.model, tuning.trainable
        self._device, self._memory = device, TensorPeak(tuning.model)
        self._optimizer = Optimizer(tuning.trainable, 1.0)

    def batch(self, rows: int, tokens: int, outputs: int) -> Batch:
        """Random real tokens; the last `outputs` of each row carry loss."""
        draws = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(0, self._vocabulary, (rows, tokens + 1), generator=draws).tolist()
        counted = (*[False] * (tokens + 1 - outputs), *[True] * outputs)
        return Batch.of([TokenSequence(tuple(ids), counted) for ids in ids_BT])

    def step(self, batch: Batch) -> tuple[float, float, float]:
        """Seconds of the forward, of the backward and of the update, as `edge_client.step` does them."""
        began = time.perf_counter()
        with self._memory.saving():
            loss = summed_loss(self._model, batch, self._device) / batch.counted
        middle = self._now()
        with torch.autograd.set_multithreading_enabled(False):
            gradients = torch.autograd.grad(loss, list(self.trainable.values()))
        back = self._now()
        self._optimizer.step(dict(zip(self.trainable, gradients, strict=True)), 1e-4)
        return middle - began, back - middle, self._now() - back

    def _now(self) -> float:
        """The clock once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True)
class _Case:
    """One model at one size."""

    model: _Timed
    rows: int
    tokens: int
    outputs: int

    @cached_property
    def batch(self) -> Batch:
        """The one that is timed."""
        return self.model.batch(self.rows, self.tokens, self.outputs)

    def timed(self, forward_s: float, backward_s: float) -> tuple[Timed, Timed]:
        """Both passes, as the fit takes them."""
        reached = self.rows * self.outputs
        flops = self.model.flops
        forward, backward = (
            Timed(
                self.model.blocks,
                one.of(self.rows, self.tokens, outputs=reached),
                one.per_output * reached,
                seconds,
            )
            for one, seconds in ((flops.forward, forward_s), (flops.backward, backward_s))
        )
        return forward, backward


def time_device(
    configuration: PreTrainedConfig, dtype: torch.dtype, device: torch.device, threads: int, told: Told
) -> Speed:
    """This device's speed with so many threads; PyTorch is left with the threads that it had.

    Raises:
        CutError, ModelError, UsageError: the model cannot be cut or trained.
    """
    had = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _time_device(configuration, dtype, device, told)
    finally:
        torch.set_num_threads(had)


def _time_device(configuration: PreTrainedConfig, dtype: torch.dtype, device: torch.device, told: Told) -> Speed:
    short, long = (_Timed(configuration, blocks, dtype, device) for blocks in BLOCKS)
    longest = longest_row(configuration)
    cases = [*_not_too_long(short, OUTPUTS, longest), *_not_too_long(short, SIZES[:1], longest)]
    cases += _not_too_long(long, SIZES, longest)
    spent: list[list[tuple[float, float, float]]] = [[] for _ in cases]
    for turn in range(ROUNDS):  # in turns, so that what disturbs for a while disturbs all alike
        for number, case in enumerate(cases):
            spent[number].append(case.model.step(case.batch))
            told(turn * len(cases) + number + 1, ROUNDS * len(cases))
    best = [[undisturbed(part) for part in zip(*steps, strict=True)] for steps in spent]
    forward, backward = zip(*(case.timed(one[0], one[1]) for case, one in zip(cases, best, strict=True)), strict=True)
    update = _fixed_update([(len(case.model.trainable), one[2]) for case, one in zip(cases, best, strict=True)])
    return Speed(forward=pass_speed(forward), backward=pass_speed(backward), **update, value_s=_time_update(device))


def _fixed_update(rests: Sequence[tuple[int, float]]) -> dict[str, float]:
    """What a step takes beside its passes, whatever it trains and for each tensor that it trains."""
    rows, seconds = [[1.0, float(tensors)] for tensors, _ in rests], [rest for _, rest in rests]
    return dict(zip(("update_s", "tensor_s"), not_negative(rows, seconds), strict=True))


def _not_too_long(model: _Timed, sizes: tuple[tuple[int, int, int], ...], longest: int | None) -> Iterator[_Case]:
    """Sizes until one takes long; each is run once, which warms it up."""
    for rows, tokens, outputs in sizes:
        case = _Case(model, rows, min(tokens, longest or tokens), min(outputs, longest or outputs))
        began = time.perf_counter()
        case.model.step(case.batch)
        yield case
        if time.perf_counter() - began > LONGEST_S:
            return


def _time_update(device: torch.device) -> float:
    """Seconds that the optimizer takes for each value of a large parameter."""
    parameter = torch.nn.Parameter(torch.zeros(VALUES, device=device))
    optimizer, gradient, spent = Optimizer({"one": parameter}, 1.0), torch.ones(VALUES, device=device), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        optimizer.step({"one": gradient}, 1e-4)
        spent.append(time.perf_counter() - began)
    return undisturbed(spent) / VALUES
