"""What must cross at active ports, made of the contract's own messages: the tests' account beside the ledger's.

Knows the tiny Llama's sizes, frames and codecs; knows no run and no ledger.
"""

import torch

from isthmus.wire.chunks import split
from isthmus.wire.frames import sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack

INPUTS = {"self_attn.q_proj": 32, "self_attn.v_proj": 32, "self_attn.o_proj": 32, "mlp.down_proj": 64}
OUTPUTS = {"self_attn.q_proj": 32, "self_attn.v_proj": 16, "self_attn.o_proj": 32, "mlp.down_proj": 32}
TARGETS = [name.rpartition(".")[2] for name in INPUTS]
Group = tuple[int, tuple[str, ...]]
"""A block and those of its ports that share one input."""


def groups(active: frozenset[str]) -> list[Group]:
    """The active ports by shared input, in the order in which the span comes to them."""
    found: dict[tuple[int, int], list[str]] = {}
    for name in sorted(active):
        block, _, module = name.partition(".")
        place = list(INPUTS).index(module)
        found.setdefault((int(block), max(place, 1)), []).append(module)  # q and v share theirs
    return [(block, tuple(modules)) for (block, _), modules in sorted(found.items())]


def crossed(frame: "pb.ClientFrame | pb.ServerFrame", key: pb.Key, payloads: list[memoryview]) -> int:
    return sent_bytes(frame) + sum(map(sent_bytes, split(key, payloads)))


def question_and_answer(group: Group, tokens: int, codec: str, backward: bool, wanted: bool) -> tuple[int, int]:
    """Bytes up and down of one round trip at a group of ports, made of the contract's own messages."""
    block, modules = group
    key = pb.Key(microbatch=1, pass_kind=pb.PASS_BACKWARD_PORT if backward else pb.PASS_FORWARD_PORT)
    inside = [pack(torch.randn(tokens, INPUTS[modules[0]]), codec)] if wanted else []
    outside = [pack(torch.randn(tokens, OUTPUTS[module]), codec) for module in modules]
    asked, answered = (outside, inside) if backward else (inside, outside)
    question = pb.PortCall(key=key, turn=1, block=block, modules=modules, backward=backward, wanted=wanted)
    question.tensors.extend(header for header, _ in asked)
    answer = pb.PortAnswer(key=key, turn=1, tensors=[header for header, _ in answered])
    up = crossed(pb.ClientFrame(port=answer), key, [payload for _, payload in answered])
    return up, crossed(pb.ServerFrame(port=question), key, [payload for _, payload in asked])


def due_at(group: Group, tokens: list[int], codec: str, below: bool) -> dict[str, int]:
    """What a step's ledger must say of one group; `below`: whether a gradient is wanted beneath it."""
    trips = [
        question_and_answer(group, count, codec, backward, wanted=below or not backward)
        for count in tokens
        for backward in (False, True)
    ]
    return {
        "up_bytes": sum(up for up, _ in trips),
        "down_bytes": sum(down for _, down in trips),
        "round_trips": len(trips),
    }


def payload_at(group: Group, tokens: int, codec: str, below: bool) -> tuple[int, int]:
    """Encoded bytes up and down of a group in both passes."""
    value = {"none": 4, "bf16": 2}[codec]
    inside, outside = INPUTS[group[1][0]], sum(OUTPUTS[module] for module in group[1])
    return value * tokens * (outside + inside * below), value * tokens * (inside + outside)
