"""Where the edge took part in the span, what that cost, and what Kill-and-Revive kept alive.

Knows ports by their names and blocks by their numbers; knows no modules and no policy.
"""

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from isthmus.report.fields.block import Block, Count, Share

PortName: TypeAlias = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]*)(\.[A-Za-z0-9_]+)+$")]


class PortCost(Block):
    """One port in training: steps in which it trained, or was only probed; its adapter's FLOPs on the edge.

    `name` is the block's number in the whole model, a dot, and the module's name in the block.
    """

    name: PortName
    trained_steps: Count
    probed_steps: Count
    edge_forward_flops: Count
    edge_backward_flops: Count

    @property
    def block(self) -> int:
        """The number of its block."""
        return int(self.name.partition(".")[0])


class BlockCost(Block):
    """What crossed for one block's ports in training: part of `cost.wire`."""

    block: Count
    up_bytes: Count
    down_bytes: Count
    round_trips: Count


class Decision(Block):
    """What Kill-and-Revive kept alive once `step` steps were done, as indices into `ports`."""

    step: Count
    alive: tuple[Count, ...]


class KillRevive(Block):
    """Kill-and-Revive: after `warmup` steps with every port, every `period` steps a `share` of them is kept alive.

    `left_edge`: whether adapter values were sent to the cloud, as parking does.
    """

    share: Share
    period: Count
    warmup: Count
    idle: Literal["drop", "park"]
    criterion: Literal["importance", "gradient", "random", "top", "scores"]
    left_edge: bool
    decisions: tuple[Decision, ...]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        steps = [decision.step for decision in self.decisions]
        if steps != sorted(set(steps)):
            raise ValueError("the decisions' steps do not ascend")
        return self


class Ports(Block):
    """Where the edge took part in the span; `kill_revive` is null where every port trained all the time."""

    kind: Literal["lora"]
    ports: tuple[PortCost, ...]
    blocks: tuple[BlockCost, ...]
    kill_revive: KillRevive | None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        decisions = self.kill_revive.decisions if self.kill_revive else ()
        if any(index >= len(self.ports) for decision in decisions for index in decision.alive):
            raise ValueError(f"a decision names a port beyond the {len(self.ports)} there are")
        if sorted({port.block for port in self.ports}) != [cost.block for cost in self.blocks]:
            raise ValueError("the blocks are not those of the ports, in order")
        return self
