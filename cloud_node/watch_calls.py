"""Counts and writes down the calls that are not a session, and refuses by name what is no message.

Knows gRPC handlers, the bytes that pass through them and how each call ended; knows nothing of what is asked.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from cloud_node.audit import Audit
from cloud_node.revoked import Revoked
from cloud_node.sending import abort
from cloud_node.watch import Watch
from isthmus.errors import CertificateError, InterruptedRunError, IsthmusError, WireError
from isthmus.trust.credentials import peer_certificate, peer_identity, peer_serial
from isthmus.wire.frames import sent_bytes
from isthmus.wire.status import read_status

NAMES = {
    "/isthmus.v1.Backbone/Describe": "describe",
    "/isthmus.v1.Backbone/FetchEnds": "fetch-ends",
    "/isthmus.v1.Offsite/List": "list-emulators",
    "/isthmus.v1.Offsite/Fetch": "fetch-emulator",
    "/isthmus.v1.Offsite/Submit": "submit",
    "/isthmus.v1.Rounds/Join": "round-join",
    "/isthmus.v1.Rounds/Keys": "round-keys",
    "/isthmus.v1.Rounds/Submit": "round-submit",
    "/isthmus.v1.Rounds/Result": "round-result",
}


BUNDLE_ID = re.compile(r"[0-9a-f]{64}")

Request: TypeAlias = Message | DecodeError
"""What a call brought, or why it is no message: gRPC itself would answer that with a status that says nothing."""


class CallCounter(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic when it runs
    """Counts into a `Watch` and an audit log; sessions count for themselves."""

    def __init__(self, watch: Watch, audit: Audit, revoked: Revoked) -> None:
        self._watch, self._audit, self._revoked = watch, audit, revoked

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
            with self._outcome(name, context) as seen:
                known = await self._arrived(seen, request, context)
                return self._count(seen, "out", await answer(known, context))

        return counted

    def _giving(self, name: str, answer: Callable[[Any, Any], AsyncIterator[Message]]) -> Any:
        async def counted(request: Request, context: Any) -> AsyncIterator[Message]:
            with self._outcome(name, context) as seen:
                known = await self._arrived(seen, request, context)
                async for part in answer(known, context):
                    if (why := self._revoked.why_not(seen.serial)) is not None:
                        await abort(context, CertificateError(why))
                    yield self._count(seen, "out", part)

        return counted

    def _taking(self, name: str, answer: Callable[[Any, Any], Awaitable[Message]]) -> Any:
        async def counted(parts: AsyncIterator[Request], context: Any) -> Message:
            with self._outcome(name, context) as seen:
                await self._may_begin(context)
                arriving = (self._still_arriving(seen, part) async for part in parts)
                try:
                    return self._count(seen, "out", await answer(arriving, context))
                except CertificateError as error:
                    await abort(context, error)

        return counted

    async def _arrived(self, seen: "_Seen", request: Request, context: Any) -> Message:
        await self._may_begin(context)
        try:
            return self._count(seen, "in", _message(request))
        except WireError as error:
            await abort(context, error)

    def _still_arriving(self, seen: "_Seen", part: Request) -> Message:
        """A part of a bundle whose sender may still be here.

        Raises:
            CertificateError: it was revoked meanwhile.
            WireError: the part is no message.
        """
        if (why := self._revoked.why_not(seen.serial)) is not None:
            raise CertificateError(why)
        return self._count(seen, "in", _message(part))

    async def _may_begin(self, context: Any) -> None:
        try:
            self._revoked.require(context.auth_context())
            self._audit.require()
        except IsthmusError as error:
            await abort(context, error)

    def _count(self, seen: "_Seen", direction: str, message: Message) -> Message:
        size = sent_bytes(message)
        seen.bytes[direction] += size
        seen.bundle = seen.bundle or _bundle_of(message)
        self._watch.bytes[seen.name, direction] += size
        return message

    @contextmanager
    def _outcome(self, name: str, context: Any) -> Iterator["_Seen"]:
        peer = context.auth_context()  # of a call that has ended it is not to be asked: gRPC crashes
        seen, outcome, code = _Seen(name, peer_serial(peer)), "failed", IsthmusError.code
        try:
            yield seen
            outcome, code = "answered", "ok"
        except grpc.aio.AbortError as aborted:
            error = read_status(context.details()) or aborted
            outcome, code = "refused", getattr(error, "code", code)
            self._watch.error(error)
            raise
        except (asyncio.CancelledError, GeneratorExit):  # the client went away
            code = InterruptedRunError.code
            raise
        except Exception as error:
            self._watch.error(error)
            raise
        finally:
            self._watch.calls[name, outcome] += 1
            self._tell(seen, code, peer)

    def _tell(self, seen: "_Seen", code: str, peer: Any) -> None:
        told = {"received_bytes": seen.bytes["in"], "sent_bytes": seen.bytes["out"]}
        certificate = peer_certificate(peer)
        self._audit.record(seen.name, peer_identity(peer), code, seen.bundle, certificate=certificate, **told)


class _Seen:
    """One call: which it is, by which certificate, what crossed, and the bundle that it was about."""

    def __init__(self, name: str, serial: int | None) -> None:
        self.name, self.serial = name, serial
        self.bytes = {"in": 0, "out": 0}
        self.bundle = ""


def _bundle_of(message: Message) -> str:
    """The id in a message that names a bundle; nothing else that a peer writes there is kept."""
    named = getattr(message, "bundle", "")
    return named if BUNDLE_ID.fullmatch(named) else ""


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
