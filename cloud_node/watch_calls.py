"""Counts the calls that are not a session: describe, fetch, list, submit; and refuses by name what is no message.

Knows gRPC handlers, the bytes that pass through them and how each call ended; knows nothing of what is asked.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from cloud_node.sending import abort
from cloud_node.watch import Watch
from isthmus.errors import WireError
from isthmus.wire.frames import sent_bytes
from isthmus.wire.status import read_status

NAMES = {
    "/isthmus.v1.Backbone/Describe": "describe",
    "/isthmus.v1.Backbone/FetchEnds": "fetch-ends",
    "/isthmus.v1.Offsite/List": "list-emulators",
    "/isthmus.v1.Offsite/Fetch": "fetch-emulator",
    "/isthmus.v1.Offsite/Submit": "submit",
}


Request: TypeAlias = Message | DecodeError
"""What a call brought, or why it is no message: gRPC itself would answer that with a status that says nothing."""


class CallCounter(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic when it runs
    """Counts into a `Watch`; sessions count for themselves."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """The call's own handler, or one around it that counts."""
        handler = await continuation(details)
        name = NAMES.get(details.method)
        return handler if handler is None or name is None else self._counted(name, handler)

    def _counted(self, name: str, handler: Any) -> Any:
        codec = _or_error(handler.request_deserializer), handler.response_serializer
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._taking(name, handler.stream_unary), *codec)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._giving(name, handler.unary_stream), *codec)
        return grpc.unary_unary_rpc_method_handler(self._answering(name, handler.unary_unary), *codec)

    def _answering(self, name: str, answer: Callable[[Any, Any], Awaitable[Message]]) -> Any:
        async def counted(request: Request, context: Any) -> Message:
            with self._outcome(name, context):
                known = await self._arrived(name, request, context)
                return self._count(name, "out", await answer(known, context))

        return counted

    def _giving(self, name: str, answer: Callable[[Any, Any], AsyncIterator[Message]]) -> Any:
        async def counted(request: Request, context: Any) -> AsyncIterator[Message]:
            with self._outcome(name, context):
                known = await self._arrived(name, request, context)
                async for part in answer(known, context):
                    yield self._count(name, "out", part)

        return counted

    def _taking(self, name: str, answer: Callable[[Any, Any], Awaitable[Message]]) -> Any:
        async def counted(parts: AsyncIterator[Request], context: Any) -> Message:
            with self._outcome(name, context):
                arriving = (self._count(name, "in", _message(part)) async for part in parts)
                return self._count(name, "out", await answer(arriving, context))

        return counted

    async def _arrived(self, name: str, request: Request, context: Any) -> Message:
        try:
            return self._count(name, "in", _message(request))
        except WireError as error:
            await abort(context, error)

    def _count(self, name: str, direction: str, message: Message) -> Message:
        self._watch.bytes[name, direction] += sent_bytes(message)
        return message

    @contextmanager
    def _outcome(self, name: str, context: Any) -> Iterator[None]:
        outcome = "failed"  # the client's going away, too
        try:
            yield
            outcome = "answered"
        except grpc.aio.AbortError as aborted:
            outcome = "refused"
            self._watch.error(read_status(context.details()) or aborted)
            raise
        except Exception as error:
            self._watch.error(error)
            raise
        finally:
            self._watch.calls[name, outcome] += 1


def _or_error(read: Callable[[bytes], Message]) -> Callable[[bytes], Request]:
    def tried(raw: bytes) -> Request:
        try:
            return read(raw)
        except DecodeError as error:
            return error

    return tried


def _message(request: Request) -> Message:
    if isinstance(request, DecodeError):
        raise WireError("what was sent is no message of this protocol; match the versions of both sides")
    return request
