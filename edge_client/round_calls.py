"""The four calls of rounds, each made again until it is answered; what they cost stands in the ledger.

Knows a channel, retries and messages; decides nothing of a round.
"""

import time
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from edge_client.channel import explain, open_channel
from edge_client.retrying import Retrying
from edge_client.stream import waiting
from isthmus.errors import IsthmusError
from isthmus.ledger.record import Ledger
from isthmus.trust.credentials import Credentials
from isthmus.wire.frames import sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc

WITHIN_S = 60.0


class RoundCalls:
    """Rounds of one cloud node."""

    def __init__(self, address: str, credentials: Credentials, ledger: Ledger, patience_s: float) -> None:
        """Ask at `HOST:PORT`; `patience_s` is how long a server that is away is waited for."""
        self._address, self._credentials = address, credentials
        self._ledger, self._patience_s = ledger, patience_s

    def join(self, request: pb.RoundJoin) -> pb.RoundState:
        """Take part, or ask how it stands."""
        state: pb.RoundState = self._asked(lambda stub: stub.Join, request, 0)
        return state

    def keys(self, request: pb.RoundKey) -> pb.RoundState:
        """Send a signed key."""
        state: pb.RoundState = self._asked(lambda stub: stub.Keys, request, 0)
        return state

    def submit(self, request: pb.RoundSubmit) -> pb.RoundState:
        """Send masked integers."""
        state: pb.RoundState = self._asked(lambda stub: stub.Submit, request, len(request.masked))
        return state

    def result(self, request: pb.RoundAsk) -> pb.RoundSum:
        """The sum of a round."""
        found: pb.RoundSum = self._asked(lambda stub: stub.Result, request, 0)
        self._ledger.add("rounds", down_payload_bytes=len(found.sum))
        return found

    def _asked(self, call: Callable[[Any], Any], request: Message, payload: int) -> Any:
        """The answer.

        Raises:
            IsthmusError: the server refuses, or was away for longer than patience lasts.
        """
        retrying = Retrying(self._patience_s)
        while True:
            try:
                return self._once(call, request, payload)
            except IsthmusError as error:
                wait_s = retrying.pause(error)
                if wait_s is None:
                    raise retrying.given_up(error) from None
            time.sleep(wait_s)

    def _once(self, call: Callable[[Any], Any], request: Message, payload: int) -> Any:
        self._ledger.add("rounds", up_bytes=sent_bytes(request), up_payload_bytes=payload)
        with waiting(self._ledger, "rounds"), open_channel(self._address, self._credentials) as channel:
            stub = pb_grpc.RoundsStub(channel)  # type: ignore[no-untyped-call]
            try:
                answer = call(stub)(request, timeout=WITHIN_S)
            except grpc.RpcError as error:
                raise explain(error, self._address, self._credentials) from None
        self._ledger.add("rounds", down_bytes=sent_bytes(answer), round_trips=1)
        return answer
