"""What a request and its answer weigh on the wire: a run's own messages, made without their tensors.

Knows messages, codecs and chunks; knows no model and no step. Whatever frames, splits and measures messages in a run
does so here, so that framing, checksums and gRPC's prefixes are all in it.
"""

from collections.abc import Sequence

import numpy as np
import torch

from isthmus.planning.figures import Crossing
from isthmus.wire.chunks import split
from isthmus.wire.codecs import encoded_size
from isthmus.wire.frames import sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import Encoded, header_of

CHECKSUM = 1 << 63
SECONDS = 1.0
"""Stand for what is known only in a run; any but 0, which is left out of a message, weigh as much."""


def hollow(dtype: torch.dtype, shape: Sequence[int], codec: str) -> Encoded:
    """A tensor as it would cross, in no memory: one byte stands for all of its payload.

    Raises:
        CodecError: the codec cannot carry such a tensor.
    """
    size = encoded_size(codec, dtype, shape)
    return header_of(dtype, shape, codec, CHECKSUM), np.broadcast_to(np.zeros(1, np.uint8), (size,)).data


def asked(call: pb.Call, tensors: Sequence[Encoded], answer: Sequence[Encoded], cost: pb.Cost, kept: bool) -> Crossing:
    """A request and its answer; `call` lacks its tensors as yet."""
    call.tensors.extend(header for header, _ in tensors)
    reply = pb.Reply(key=call.key, tensors=[header for header, _ in answer], kept=kept, cost=cost)
    up = _weight(pb.ClientFrame(call=call), call.key, tensors)
    return Crossing(up, _weight(pb.ServerFrame(reply=reply), call.key, answer), 1)


def asked_at_ports(question: pb.PortCall, tensors: Sequence[Encoded], answer: Sequence[Encoded]) -> Crossing:
    """A question of a running pass and the edge's answer; `question` lacks its tensors as yet."""
    question.tensors.extend(header for header, _ in tensors)
    key = question.key
    replied = pb.PortAnswer(key=key, turn=question.turn, tensors=[header for header, _ in answer])
    down = _weight(pb.ServerFrame(port=question), key, tensors)
    return Crossing(_weight(pb.ClientFrame(port=replied), key, answer), down, 1)


def cost_of(forward_flops: int = 0, backward_flops: int = 0, at_ports: bool = False) -> pb.Cost:
    """What a cloud node says of a pass, its seconds being any."""
    return pb.Cost(
        forward_flops=forward_flops,
        backward_flops=backward_flops,
        forward_s=SECONDS if forward_flops else 0.0,
        backward_s=SECONDS if backward_flops else 0.0,
        queue_s=SECONDS,
        port_s=SECONDS if at_ports else 0.0,
    )


def _weight(frame: pb.ClientFrame | pb.ServerFrame, key: pb.Key, tensors: Sequence[Encoded]) -> int:
    payloads = [payload for _, payload in tensors]
    return sent_bytes(frame) + sum(sent_bytes(chunk) for chunk in split(key, payloads))
