"""The weights of an emulator while they train: which they are, how far a step moves them, what a checkpoint holds.

Knows a pair and an optimizer; knows no text, no losses and no files.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from emulator.pair import Pair
from isthmus.emulated.forms import Quantised
from isthmus.errors import RunError
from isthmus.training.optimizer import Optimizer

CLIP_NORM = 1.0


class TrainedWeights:
    """What trains: every parameter of the emulator; whole numbers stay.

    A scale trains as the greatest weight that its group can hold, so that a step moves no weight further than a step
    moves the weights that have no scale. The factor between the two is a power of 2 and loses nothing.
    """

    def __init__(self, pair: Pair) -> None:
        self._parameters = pair.own()
        self._reach = {name: _reach(pair.twin, name) for name in self._parameters}
        self._values = {
            name: parameter if self._reach[name] == 1 else nn.Parameter(parameter.detach() * self._reach[name])
            for name, parameter in self._parameters.items()
        }
        self._optimizer = Optimizer(self._values, CLIP_NORM)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Let gradients reach the weights while in here."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad_(False)

    @property
    def held_bytes(self) -> int:
        """Of gradients, of values that stand beside the weights, and of the optimizer."""
        own = [one for name, one in self._values.items() if one is not self._parameters[name]]
        gradients = sum(one.nbytes for one in self._parameters.values())
        return gradients + sum(one.nbytes for one in own) + self._optimizer.state_bytes

    def gradients(self, aim: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of `aim`, by name, for `step`."""
        found = torch.autograd.grad(aim, list(self._parameters.values()), allow_unused=True)
        return {
            name: gradient / self._reach[name]
            for name, gradient in zip(self._parameters, found, strict=True)
            if gradient is not None  # of an expert that no token of the batch went to
        }

    def step(self, gradients: dict[str, torch.Tensor], rate: float) -> float:
        """Take one step down; returns the gradients' norm before clipping."""
        norm = self._optimizer.step(gradients, rate)
        self._put_back()
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, moments and step counts, on the CPU."""
        return {name: tensor.contiguous() for name, tensor in self._optimizer.state().items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a `state` of the same emulator.

        Raises:
            RunError: it is of another.
        """
        try:
            self._optimizer.load(state)
        except (KeyError, RuntimeError):
            raise RunError(
                "the checkpoint is of another emulator; resume with the same settings, or begin anew"
            ) from None
        self._put_back()

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not self._values[name]:
                parameter.copy_(self._values[name] / self._reach[name])


def _reach(twin: nn.Module, name: str) -> float:
    """What a parameter is multiplied by where it meets the input: whole numbers go with a scale, 1 with any other."""
    path, _, last = name.rpartition(".")
    module = twin.get_submodule(path)
    return float(1 << (module.bits - 1)) if isinstance(module, Quantised) and last == "scale" else 1.0
