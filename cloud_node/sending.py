"""How a call of the contract ends in an error of the catalogue, and how a bundle leaves the node.

Knows gRPC contexts and bundles on disk; knows neither sessions nor what a bundle is for.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

from isthmus import bundle
from isthmus.bundle import Manifest
from isthmus.errors import IsthmusError
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.status import status_code, status_details


async def abort(context: Any, error: IsthmusError) -> NoReturn:
    """End a call with an error's status."""
    await context.abort(status_code(error), status_details(error))
    raise error  # abort has raised already; this tells the type checker


async def bundle_frames(
    folder: Path, manifest: Manifest, offset: int, context: Any, paced: Callable[[int], Awaitable[None]]
) -> AsyncIterator[pb.BundleFrame]:
    """A bundle from any offset on; its manifest and signature first. `paced` waits until so many bytes may go."""
    try:
        signature = bundle.read_signature(folder)
        yield pb.BundleFrame(manifest=manifest.to_bytes(), signature=signature, offset=offset)
        for at, data in bundle.read(folder, manifest, offset):
            await paced(len(data))
            yield pb.BundleFrame(offset=at, data=data)
    except IsthmusError as error:
        await abort(context, error)
