"""What of an adapter takes part in a step: all of it, or the ports in the span that Kill-and-Revive leaves alive.

Knows the policy, the adapters' values and gradients, and where idle values go; decides nothing itself, and knows no
data. A killed port is dropped, so that no value of it leaves the edge and it begins anew if it is revived; or parked:
its values are left frozen with the cloud.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel
from edge_client.kill_revive import Change, KillRevive, Plan, PortShape, Signal
from edge_client.port_adapters import PortAdapters
from edge_client.span_values import SpanValues
from edge_client.tuning import LoraPort, Tuning
from isthmus.errors import UsageError
from isthmus.linears import Site
from isthmus.ports import CORE, Port
from isthmus.training.optimizer import Optimizer

Gradients = Mapping[str, torch.Tensor]


class TakingPart:
    """Says, step by step, which parameters have a gradient, and which of these are trained."""

    def __init__(self, config: TrainConfig, edge: EdgeModel, tuning: Tuning, optimizer: Optimizer, steps: int) -> None:
        """Take hold of a run's ports; without any, everything takes part in each of the `steps`.

        Raises:
            UsageError: the settings of Kill-and-Revive do not fit the ports.
        """
        self._tuning = tuning
        self._edge = edge
        self._optimizer = optimizer
        self._park = config.kr_idle == "park"
        self._parked: frozenset[str] = frozenset()
        self._left_edge = False
        if edge.adapters is not None:
            edge.adapters.attached()
        self.policy = policy_of(config, edge.adapters, steps) if config.kr_active is not None else None
        self._probes: frozenset[str] = frozenset()
        self.trained = dict.fromkeys(tuning.ports, 0)
        self.probed = dict.fromkeys(tuning.ports, 0)

    @property
    def left_edge(self) -> bool:
        """Whether values of an adapter were left with the cloud."""
        return self._left_edge or isinstance(self._edge.adapters, SpanValues)

    def begin(self, step: int) -> dict[str, nn.Parameter]:
        """Settle which ports take part in `step` (0-based); returns the parameters that will have a gradient."""
        adapters = self._edge.adapters
        if adapters is None:
            return self._tuning.trainable
        if self.policy is None:
            adapters.active = frozenset(adapters.sites)
            self._count(frozenset(self._tuning.ports), frozenset())
            return self._tuning.trainable
        change = self.policy.decide(step)
        if change is not None and not self._park:
            self._drop(change)
        self._leave_idle()
        active = self.policy.active(step)
        self._probes = active - self.policy.alive
        adapters.active = sites_of(adapters, active)
        self._count(self.policy.alive, self._probes)
        return self._tuning.without(self._tuning.ports.keys() - active)

    def trains(self, gradients: Gradients) -> dict[str, torch.Tensor]:
        """The gradients to train by: those of probed ports are for measuring alone."""
        kept = self._tuning.without(self._probes)
        return {name: gradient for name, gradient in gradients.items() if name in kept}

    def observe(self, step: int, gradients: Gradients, rate: float) -> None:
        """Tell the policy what a step of learning rate `rate` measured, before it is taken."""
        if self.policy is not None:
            active = self.policy.alive | self._probes
            self.policy.observe(step, {name: self._signal(name, gradients, rate) for name in sorted(active)})

    def rest(self) -> None:
        """Let those ports take part that add something: for passes that no training follows."""
        adapters = self._edge.adapters
        if adapters is not None:
            alive = self.policy.alive if self.policy is not None else self._tuning.ports.keys()
            self._leave_idle()
            adapters.active = sites_of(adapters, frozenset(filter(self._has_moved, alive)))
            adapters.leave()

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON."""
        policy = self.policy.state() if self.policy is not None else None
        return {"policy": policy, "trained": self.trained, "probed": self.probed, "left_edge": self.left_edge}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken.

        Raises:
            RunError: it is of other ports.
        """
        if self.policy is not None:
            self.policy.load(state["policy"])
            self._settle()
        self._left_edge = state["left_edge"]
        self.trained |= state["trained"]
        self.probed |= state["probed"]

    def _drop(self, change: Change) -> None:
        self._optimizer.begin_anew(self._tuning.begin_anew(change.killed))
        self._settle()

    def _settle(self) -> None:
        if self.policy is not None and not self._park:
            self._tuning.alive = self.policy.alive

    def _leave_idle(self) -> None:
        """Leave with the cloud what is idle there, if that is wanted and has changed."""
        if self.policy is None or not self._park:
            return
        idle = frozenset(filter(self._has_moved, self._tuning.ports.keys() - self.policy.alive))
        if idle == self._parked:
            return
        park(self._edge, self._tuning, idle)
        self._parked, self._left_edge = idle, self._left_edge or bool(idle)

    def _has_moved(self, name: str) -> bool:
        return bool(self._tuning.trainable[self._tuning.ports[name].up].any())

    def _signal(self, name: str, gradients: Gradients, rate: float) -> Signal:
        port = self._tuning.ports[name]
        found = [gradients[parameter].float() for parameter in port.parameters]
        up = self._tuning.trainable[port.up].detach().float()
        stays = self._park and name in self._probes  # its change is part of the model, alive or not
        # With y = W x + s·U D x, <dL/dU, U> is <dL/dΔW, ΔW>, as <dL/dC, C> of a core: the loss's
        # change to first order, were ΔW taken away.
        return Signal(
            change=0.0 if stays else abs(float((found[-1] * up).sum())),
            step=rate * sum(float(gradient.abs().sum()) for gradient in found),
            norm=math.sqrt(sum(float(gradient.square().sum()) for gradient in found)),
        )

    def _count(self, trained: frozenset[str], probed: frozenset[str]) -> None:
        for name in trained:
            self.trained[name] += 1
        for name in probed:
            self.probed[name] += 1


def park(edge: EdgeModel, tuning: Tuning, idle: frozenset[str]) -> None:
    """Leave the adapters of the ports `idle` with the cloud, frozen, in place of those left before."""
    if edge.adapters is None or edge.remote is None:
        return
    values, sites = tuning.trainable, sites_of(edge.adapters, idle)
    ports = [tuning.ports[name_of(site)] for site in edge.adapters.sites if site in sites]
    frozen = [
        (values[port.down].detach(), values[port.up].detach() * port.scale)
        for port in ports
        if isinstance(port, LoraPort)  # cores are not parked
    ]
    edge.remote.park(frozen, edge.adapters.bitmap(sites))


def name_of(site: Site) -> str:
    """A port's name: block, dot, module."""
    return f"{site[0]}.{site[1]}"


def sites_of(adapters: PortAdapters, names: frozenset[str]) -> frozenset[Site]:
    """The ports that have these names."""
    return frozenset(site for site in adapters.sites if name_of(site) in names)


def policy_of(config: TrainConfig, adapters: PortAdapters | None, steps: int) -> KillRevive:
    """The policy that picks the ports of a run of so many steps.

    Raises:
        UsageError: the settings do not fit the ports.
    """
    if adapters is None or config.kr_active is None:
        raise UsageError("Kill-and-Revive picks ports in the span; give --method dlora")
    scores = _read_scores(config.kr_scores) if config.kr_scores is not None else None
    plan = Plan(config.kr_active, config.kr_period, config.kr_warmup, config.kr_criterion, config.seed, scores)
    if plan.first >= steps:
        raise UsageError(f"nothing would be killed in {steps} steps; lower --kr-warmup, which is {plan.warmup}")
    return KillRevive({name_of((port.block, port.module)): _shape(adapters, port) for port in adapters.ports}, plan)


def _shape(adapters: PortAdapters, port: Port) -> PortShape:
    linear = adapters.linears[port.block, port.module]
    if port.kind == CORE:
        return PortShape(port.block, linear.shared[0], own=4 * port.rank, shared=0)
    return PortShape(port.block, linear.shared[0], own=2 * linear.outputs, shared=2 * linear.inputs)


def _read_scores(path: Path) -> dict[str, float]:
    """Importances by port, as JSON: {"12.self_attn.q_proj": 0.7}.

    Raises:
        UsageError: the file is none such.
    """
    try:
        found = json.loads(path.read_text())
        return {str(name): float(value) for name, value in found.items()}
    except OSError as error:
        raise UsageError(f"--kr-scores {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        example = '{"12.attn.q_proj": 0.7}'
        raise UsageError(f"--kr-scores {path} is no JSON object of numbers, such as {example}") from None
