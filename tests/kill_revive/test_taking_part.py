"""What takes part in a step is what trains: as plain `peft` would train the alive modules alone, step for step.

The decisions are given here, so that what follows from them can be written down by hand.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_client.config import TrainConfig
from edge_client.kill_revive import Change, KillRevive, Plan, PortShape
from edge_client.link import Link
from edge_client.taking_part import TakingPart
from isthmus.training.batches import batch_at
from isthmus.training.data import TokenSequence
from isthmus.wire.gen import backbone_pb2 as pb
from tests.faults.training import Learner, settings
from tests.harness import Server
from tests.kill_revive.conftest import QUERIES_AND_VALUES
from tests.parity.reference import (
    ALPHA,
    RANK,
    end_blocks,
    plain_lora,
    plain_loss,
    relative,
    trainable,
    whole_model,
)

ALL = frozenset(QUERIES_AND_VALUES)
Q1, V1, Q2, V3 = "1.self_attn.q_proj", "1.self_attn.v_proj", "2.self_attn.q_proj", "3.self_attn.v_proj"
ALIVE_FROM = {2: {Q1, V3}, 5: {Q1, V1}, 8: {V3, V1}}
"""After two steps with all, V3 is killed at 5 and revived at 8; V1 is revived at 5."""
PROBED_AT = {4: {V1, Q2}, 7: {V3, Q2}}
STEPS, RATE, CLIP = 11, 1e-2, 0.5


class Script(KillRevive):
    """Decisions and probes as above, whatever is measured."""

    def __init__(self) -> None:
        super().__init__({name: PortShape(0, "x", 1, 1) for name in ALL}, Plan(0.25, 3, 2, "importance", seed=0))

    def decide(self, step: int) -> Change | None:
        if step not in ALIVE_FROM:
            return None
        before, self._alive = self._alive, frozenset(ALIVE_FROM[step])
        self.decisions.append((step, tuple(sorted(self._alive))))
        return Change(before - self._alive, self._alive - before)

    def active(self, step: int) -> frozenset[str]:
        return self._alive.union(PROBED_AT.get(step, ()))


@dataclass(frozen=True)
class Taken:
    """What one step did: the alive and active ports, every gradient that was found, and the norm that was clipped."""

    change: Change | None
    alive: frozenset[str]
    active: frozenset[str]
    gradients: Mapping[str, torch.Tensor]
    norm: float


class Taker(Learner):
    """An edge whose steps go as those of a run, by the script's decisions."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.taking = TakingPart(config, self.edge, self.tuning, self._optimizer, steps=100)
        self.taking.policy = self.script = Script()
        self._decided = self.script.alive

    def take(self, number: int) -> Taken:
        """One step."""
        wanted = self.taking.begin(number)
        found = self._stepper.gradients(self.batches(number), number, wanted)
        self.taking.observe(number, found.by_name, RATE)
        gradients = {name: gradient.clone() for name, gradient in found.by_name.items()}  # before they are clipped
        norm = self._optimizer.step(self.taking.trains(found.by_name), RATE)
        before, self._decided = self._decided, self.script.alive
        change = Change(before - self._decided, self._decided - before) if before != self._decided else None
        return Taken(change, self.script.alive, self.script.active(number), gradients, norm)

    def sequences(self, number: int) -> list[TokenSequence]:
        """The rows of a step."""
        lengths = tuple(len(row.train.ids) for row in self._examples)
        chosen = batch_at(lengths, self._config.batch_size, self._config.seed, number)
        return [self._examples[row].train for row in chosen]

    def parameters(self, ports: Collection[str]) -> set[str]:
        """Names of the parameters at some ports."""
        return {name for port in ports for name in self.tuning.ports[port].parameters}

    def remembers(self, port: str) -> int:
        """Steps that the optimizer remembers of a port; 0 where it knows nothing of it."""
        state = self._optimizer.state()
        steps = {int(state[f"step/{name}"]) if f"step/{name}" in state else 0 for name in self.parameters([port])}
        assert len(steps) == 1
        return steps.pop()


class Hand:
    """The same training by hand: plain `peft` on the whole model, clipping and AdamW over what is alive."""

    def __init__(self, model: Path, taker: Taker, drops: bool) -> None:
        targets = [f"{block}.self_attn.{name}" for block in end_blocks("1:1") for name in ("q_proj", "v_proj")]
        modules = [f"model.layers.{name}" for name in (*targets, *ALL)]
        self._model = plain_lora(whole_model(model), "llama", modules, taker.values)
        self.values = trainable(self._model)
        self._adam = torch.optim.AdamW(self.values.values(), lr=RATE, weight_decay=0.0)
        self._taker = taker
        self._drops = drops

    @torch.no_grad()
    def forget(self, ports: Collection[str]) -> None:
        """What dropping means."""
        for name in self._taker.parameters(ports):
            self._adam.state.pop(self.values[name], None)
            if ".lora_B." in name:
                self.values[name].zero_()

    def take(self, number: int, taken: Taken) -> tuple[dict[str, torch.Tensor], float]:
        """One step; returns every module's gradient, and the norm of those that train."""
        if self._drops and taken.change is not None:
            self.forget(taken.change.killed)
        self._adam.zero_grad()
        plain_loss(self._model, self._taker.sequences(number)).backward()  # type: ignore[no-untyped-call]
        gradients = {name: value.grad.clone() for name, value in self.values.items() if value.grad is not None}
        for name in self._taker.parameters(ALL - taken.alive):
            self.values[name].grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(self.values.values(), CLIP))
        self._adam.step()
        return gradients, norm


@contextmanager
def taking(server: Server, rows: Path, idle: str) -> Iterator[Taker]:
    """An edge that follows the script, while in here."""
    sizes = {"rank": RANK, "alpha": ALPHA, "clip_norm": CLIP, "batch_size": 4}
    taker = Taker(settings(server, rows, method="dlora", kr_active=0.25, kr_idle=idle, **sizes))
    try:
        yield taker
    finally:
        taker.close()


@pytest.mark.parametrize("idle", ["drop", "park"])
def test_every_step_is_that_of_plain_peft_with_the_alive_modules_alone(
    servers: dict[str, Server], tiny_models: dict[str, Path], rows: Path, idle: str
) -> None:
    with taking(servers["llama"], rows, idle) as taker:
        hand = Hand(tiny_models["llama"], taker, drops=idle == "drop")
        ends = taker.values.keys() - taker.parameters(ALL)
        for number in range(STEPS):
            taken = taker.take(number)
            gradients, norm = hand.take(number, taken)
            active = ends | taker.parameters(taken.active)
            assert taken.gradients.keys() == active
            assert relative(taken.gradients, {name: gradients[name] for name in active}) < 1e-4
            assert taken.norm == pytest.approx(norm, rel=1e-4)
            assert relative(taker.values, {name: value.detach() for name, value in hand.values.items()}) < 1e-4
        dead = {name: gradients[name] for name in taker.parameters(ALL - taken.active)}
        assert all(
            bool(value.any()) for name, value in dead.items() if ".lora_B." in name
        )  # they had something to learn


@pytest.mark.parametrize("idle", ["drop", "park"])
def test_a_probed_port_is_measured_but_not_moved(servers: dict[str, Server], rows: Path, idle: str) -> None:
    with taking(servers["llama"], rows, idle) as taker:
        for number in range(STEPS):
            before = taker.values
            remembered = {port: taker.remembers(port) for port in ALL}
            taken = taker.take(number)
            probed = taken.active - taken.alive
            assert probed == PROBED_AT.get(number, set())
            for port in probed:
                assert all(torch.equal(taker.values[name], before[name]) for name in taker.parameters([port]))
                assert any(bool(taken.gradients[name].any()) for name in taker.parameters([port]))
                assert taker.remembers(port) in (0, remembered[port])
            for port in taken.alive:
                assert any(not torch.equal(taker.values[name], before[name]) for name in taker.parameters([port]))


def test_a_dropped_module_adds_nothing_and_begins_anew(servers: dict[str, Server], rows: Path) -> None:
    with taking(servers["llama"], rows, "drop") as taker:
        for number in range(STEPS):
            taken = taker.take(number)
            for port in ALL - taken.alive:
                up = taker.values[taker.tuning.ports[port].up]
                assert not up.any()
                assert taker.remembers(port) == 0
            assert taker.tuning.alive == (taken.alive if number >= 2 else ALL)
        assert taker.remembers(Q1) == 0
        assert (taker.remembers(V1), taker.remembers(V3)) == (STEPS - 5, STEPS - 8)  # since they were revived last


def test_a_parked_module_goes_on_from_where_it_was(servers: dict[str, Server], rows: Path) -> None:
    with taking(servers["llama"], rows, "park") as taker:
        for number in range(STEPS):
            before = taker.values
            taken = taker.take(number)
            idle = taker.parameters(ALL - taken.alive)
            assert all(torch.equal(taker.values[name], before[name]) for name in idle)
        assert taker.remembers(Q2) == 2
        assert taker.remembers(V3) == STEPS - 3
        assert all(bool(taker.values[port.up].any()) for port in taker.tuning.ports.values())


@pytest.mark.parametrize("idle", ["drop", "park"])
def test_adapter_values_leave_the_edge_when_they_are_parked_and_never_else(
    servers: dict[str, Server], rows: Path, idle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[pb.Call] = []
    request = Link.request

    def noted(self: Link, call: pb.Call, *rest: Any, **named: Any) -> Any:
        sent.append(call)
        return request(self, call, *rest, **named)

    monkeypatch.setattr(Link, "request", noted)
    with taking(servers["llama"], rows, idle) as taker:
        parked = []
        for number in range(STEPS):
            sent.clear()
            taken = taker.take(number)
            parks = [call for call in sent if call.key.pass_kind == pb.PASS_PARK]
            assert len(parks) == (idle == "park" and taken.change is not None)
            parked += [len(call.tensors) for call in parks]
        assert parked == ([2 * 6] * len(ALIVE_FROM) if idle == "park" else [])
        assert taker.taking.left_edge == (idle == "park")
