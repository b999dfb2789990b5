"""What a stream's requests hold until their answers have left: bytes here, and tokens of what their owner may have.

Knows requests by their headers; knows no tensors and no frames.
"""

from cloud_node.policy.guard import Guard
from isthmus.errors import LimitError
from isthmus.wire.gen import backbone_pb2 as pb


class Unanswered:
    """The requests of one stream that are not answered."""

    def __init__(self, guard: Guard, call_bytes: int) -> None:
        """Hold at most `call_bytes`; a single request may always be."""
        self._guard = guard
        self._call_bytes = call_bytes
        self._declared: dict[int, int] = {}  # bytes, by the call's identity

    def begin(self, call: pb.Call, declared: int) -> None:
        """Take a request in that holds so many bytes.

        Raises:
            LimitError: it is too much now, or for its owner.
            ForbiddenError: its owner may not ask it.
        """
        if self._declared and sum(self._declared.values()) + declared > self._call_bytes:
            raise LimitError(f"more than {self._call_bytes} bytes are unanswered; wait for some")
        self._guard.begin(call)
        self._declared[id(call)] = declared

    def done(self, call: pb.Call, sent: int = 0) -> None:
        """A request was refused, or answered with so many bytes."""
        self._declared.pop(id(call), None)
        self._guard.sent(sent)
        self._guard.done(call)
