"""A session's requests as they are computed: each once, however often it is sent and on whichever stream.

Knows requests that are complete, and the threads that compute; knows no frames and no order.
"""

import asyncio
from concurrent.futures import Executor

from cloud_node.calls import Calls, Result
from cloud_node.session import RequestId, Session, request_id
from cloud_node.watch import SessionWatch
from isthmus.faults import Fault, passing
from isthmus.wire.chunks import Assembly
from isthmus.wire.gen import backbone_pb2 as pb


class Computing:
    """Computes what arrives on one stream of a session; what an earlier stream has begun is joined."""

    def __init__(self, session: Session, calls: Calls, pool: Executor, watch: SessionWatch) -> None:
        """Carry out `calls` in the session's own threads, or else in `pool`, and tell `watch` what it cost."""
        self._session = session
        self._calls = calls
        self._pool = session.pool or pool
        self._watch = watch

    async def result(self, call: pb.Call, assembly: Assembly) -> Result:
        """A request's answer; where whoever waits for it is cancelled, the work goes on for whoever asks again.

        Raises:
            IsthmusError: it cannot be answered.
        """
        request = request_id(call.key)
        running = self._session.running.get(request)
        if running is None:
            running = asyncio.get_running_loop().create_task(self._compute(call, assembly))
            self._session.running[request] = running
            running.add_done_callback(lambda done: self._computed(request, done))
        return await asyncio.shield(running)

    async def _compute(self, call: pb.Call, assembly: Assembly) -> Result:
        loop = asyncio.get_running_loop()
        passing(Fault.SERVER_BEFORE_COMPUTE)
        result = await loop.run_in_executor(self._pool, self._calls.carry_out, call, assembly)
        passing(Fault.SERVER_AFTER_COMPUTE)
        self._watch.computed(call.key, result[0].cost)
        return result

    def _computed(self, request: RequestId, done: "asyncio.Task[Result]") -> None:
        """Forget a request that has run; where its client is gone nobody else looks at how it ended."""
        self._session.running.pop(request, None)
        if not done.cancelled():
            done.exception()
