"""A submission's frames on their way to the disk: in order, with progress, and never on the event loop.

Knows frames and whoever takes a bundle in; knows no identities, and judges nothing but the order.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from isthmus.bundle import CHUNK_BYTES
from isthmus.errors import BundleError, UnreachableError, WireError
from isthmus.faults import Fault, passing
from isthmus.receiver import Receiver
from isthmus.wire.gen import backbone_pb2 as pb

log = logging.getLogger(__name__)

STALL_S = 60.0
"""A submission that makes no progress for so long is given up: the next one of its identity waits for it."""

PROGRESS_BYTES = CHUNK_BYTES
"""So much is progress, or whatever is missing: a byte now and then is none."""

Given = ParamSpec("Given")
Result = TypeVar("Result")


async def first_of(frames: AsyncIterator[pb.BundleFrame]) -> pb.BundleFrame:
    """The first frame.

    Raises:
        WireError, UnreachableError: none comes.
    """
    async with _patience():
        return await _next(frames)


async def receive(receiver: Receiver, first: pb.BundleFrame, frames: AsyncIterator[pb.BundleFrame]) -> Path:
    """The folder of the whole bundle, its files as their hashes say.

    Raises:
        BundleError: what arrives is not what was announced, or cannot be written.
        WireError, UnreachableError: the frames are not those of a bundle, or too little comes in `STALL_S`.
    """
    total = (await on_disk(receiver.begin, first.manifest, first.signature)).total_bytes
    while receiver.offset < total:
        enough = min(receiver.offset + PROGRESS_BYTES, total)
        async with _patience():
            while receiver.offset < enough:
                await _add(receiver, await _next(frames))
    try:
        return await on_disk(receiver.finish)
    except BundleError as error:
        log.warning("a submission cannot be kept: %s", error)
        raise BundleError("what arrived is not what the submission's hashes say: submit again") from None


async def on_disk(work: Callable[Given, Result], *given: Given.args, **named: Given.kwargs) -> Result:
    """Write in a thread, so that no other call waits for the disk.

    Where this call is cancelled, the writing ends first: whoever then removes files must not meet it.
    """
    writing = asyncio.ensure_future(asyncio.to_thread(work, *given, **named))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.gather(writing, return_exceptions=True)
        raise


async def _add(receiver: Receiver, frame: pb.BundleFrame) -> None:
    if not frame.data or frame.manifest or frame.offset != receiver.offset:
        raise WireError(f"the submission does not go on at byte {receiver.offset}: submit again")
    await on_disk(receiver.add, frame.offset, frame.data)
    passing(Fault.SUBMISSION_HALF_ARRIVED)


async def _next(frames: AsyncIterator[pb.BundleFrame]) -> pb.BundleFrame:
    try:
        return await anext(aiter(frames))
    except StopAsyncIteration:
        raise WireError("the submission ended before all of it was here: submit again") from None


@asynccontextmanager
async def _patience() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(STALL_S):
            yield
    except TimeoutError:
        raise UnreachableError(f"the submission made no progress for {STALL_S:g} s: submit again") from None
