"""AdamW over named parameters, with float32 masters, a schedule and clipping; its whole state as tensors.

Knows numbers by name; knows no model, no data and no files.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

Schedule = Literal["linear", "cosine", "constant"]


def rate_at(step: int, steps: int, peak: float, schedule: Schedule, warmup: int) -> float:
    """The learning rate of step `step` (0-based) of `steps`: linear warm-up, then `schedule` towards 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return peak * (1 - done)
    return peak * (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else peak


class Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) without weight decay; moments and masters in float32 on the device."""

    def __init__(self, parameters: dict[str, nn.Parameter], clip_norm: float) -> None:
        self._parameters = parameters
        self._masters = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in parameters.items()
        }
        self._adam = torch.optim.AdamW(self._masters.values(), weight_decay=0.0)
        self._clip_norm = clip_norm

    @torch.no_grad()
    def step(self, gradients: Mapping[str, torch.Tensor], rate: float) -> float:
        """Take one step with the parameters that have a gradient; returns the gradients' norm before clipping."""
        for name, gradient in gradients.items():
            self._masters[name].grad = gradient.to(torch.float32, copy=True)  # clipping changes it
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self._clip_norm)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        for name in gradients:
            parameter = self._parameters[name]
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])
            self._masters[name].grad = None
        return float(norm)

    @torch.no_grad()
    def begin_anew(self, names: Iterable[str]) -> None:
        """Take parameters' present values, and forget how they came to them."""
        for name in names:
            master = self._masters[name]
            master.copy_(self._parameters[name])
            self._adam.state.pop(master, None)

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of the masters, float32 on the CPU."""
        return {name: master.detach().cpu().clone() for name, master in self._masters.items()}

    @torch.no_grad()
    def set_values(self, values: Mapping[str, torch.Tensor]) -> None:
        """Go on from other values of all parameters, with the moments that there are."""
        for name, master in self._masters.items():
            master.copy_(values[name])
            self._parameters[name].copy_(master)

    def state(self) -> dict[str, torch.Tensor]:
        """Masters, moments and step counts by `kind/name`, on the CPU."""
        tensors = {f"master/{name}": master.detach() for name, master in self._masters.items()}
        for name, master in self._masters.items():
            for kind, value in self._adam.state.get(master, {}).items():
                tensors[f"{kind}/{name}"] = value
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a `state` of the same parameters."""
        for name, master in self._masters.items():
            master.copy_(state[f"master/{name}"])
            self._parameters[name].copy_(master)
            if f"step/{name}" in state:  # absent before the first step
                self._adam.state[master] = {
                    "step": state[f"step/{name}"].clone(),
                    "exp_avg": state[f"exp_avg/{name}"].to(master.device, copy=True),
                    "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(master.device, copy=True),
                }

    @property
    def state_bytes(self) -> int:
        """Bytes of moments, and of masters that are not the parameters themselves."""
        own = sum(master.nbytes for name, master in self._masters.items() if master is not self._parameters[name])
        return own + 2 * sum(4 * master.numel() for master in self._masters.values())
