"""The standard health service of gRPC (grpc.health.v1) for a node.

Knows the two calls and who may ask how often; whether the node is well is known to `health`.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from cloud_node.health import EVERY_S
from cloud_node.service import BackboneService
from isthmus.wire.gen import health_pb2 as pb

SERVICES: Final = ("", "isthmus.v1.Backbone")
WITHIN_S: Final = 5.0
"""A token that is not through by then is judged without."""

WATCHERS: Final = 32
"""Streams of `Watch` at once."""


class HealthService:
    """Answers `Check` and `Watch`. All who ask at once share one judgement, and tokens are rarer still."""

    def __init__(self, service: BackboneService) -> None:
        self._service = service
        self._judging: asyncio.Task[str | None] | None = None
        self._watchers = 0

    def handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """The calls, for the node's server."""
        codec = pb.HealthRequest.FromString, pb.HealthAnswer.SerializeToString
        calls = {
            "Check": grpc.unary_unary_rpc_method_handler(self.check, *codec),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch, *codec),
        }
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", calls)

    async def check(self, request: pb.HealthRequest, context: Any) -> pb.HealthAnswer:
        """The status now; NOT_FOUND for a service that is not here."""
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service; ask for isthmus.v1.Backbone")
        return pb.HealthAnswer(status=await self._status())

    async def watch(self, request: pb.HealthRequest, context: Any) -> AsyncIterator[pb.HealthAnswer]:
        """The status, and again whenever it changes."""
        if self._watchers >= WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS} watch already; use Check")
        self._watchers += 1
        told = None
        try:
            while True:
                known = request.service in SERVICES
                status = await self._status() if known else pb.HealthAnswer.SERVICE_UNKNOWN
                if status != told:
                    yield pb.HealthAnswer(status=status)
                told = status
                await asyncio.sleep(EVERY_S)
        finally:
            self._watchers -= 1

    async def _status(self) -> "pb.HealthAnswer.Status":
        if self._service.draining:
            return pb.HealthAnswer.NOT_SERVING
        if self._judging is None or self._judging.done():
            judged = asyncio.to_thread(self._service.health.missing, WITHIN_S)
            self._judging = asyncio.get_running_loop().create_task(judged)
        missing = await asyncio.shield(self._judging)  # one who leaves ends it for nobody else
        return pb.HealthAnswer.SERVING if missing is None else pb.HealthAnswer.NOT_SERVING
