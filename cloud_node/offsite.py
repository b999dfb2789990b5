"""The gRPC face of Offsite-Tuning: which emulators there are, an emulator, and adapters handed in.

Knows folders of emulators and who may have them; what becomes of a submission is decided in `submissions`.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloud_node.policy.authority import Authority
from cloud_node.sending import abort, bundle_frames
from cloud_node.service import Model
from cloud_node.session import require_protocol
from cloud_node.submissions import Submissions
from emulator.damage import reason_of
from isthmus import bundle
from isthmus.bundle import MANIFEST, Manifest
from isthmus.cut import Cut
from isthmus.emulated.recipe import FILE_NAME, Emulator
from isthmus.errors import BundleError, ForbiddenError, IsthmusError, LimitError, ModelError, UsageError
from isthmus.ledger import told
from isthmus.trust.credentials import peer_identity
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.options import MESSAGE_BYTES

log = logging.getLogger(__name__)

LARGEST = 2
"""An adapter may have as many times the bytes of what was given out at its cut: bfloat16 weights train as float32."""


@dataclass(frozen=True)
class Offered:
    """An emulator that edges may fetch."""

    folder: Path
    manifest: Manifest
    offer: pb.EmulatorOffer


class OffsiteService:
    """Answers the three calls of the contract."""

    def __init__(
        self, emulators: Sequence[Offered], submissions: Submissions | None, authority: Authority | None = None
    ) -> None:
        """Offer `emulators`, and take adapters if there is somewhere to put them; `authority` says from and to whom.

        Raises:
            LimitError: the list of emulators is larger than a message may be.
        """
        self._emulators = {each.manifest.id: each for each in emulators}
        self._submissions = submissions
        self._authority = authority or Authority()
        self._list = pb.EmulatorList(emulators=[each.offer for each in emulators])
        if self._list.ByteSize() > MESSAGE_BYTES:
            raise LimitError(
                f"the emulators' descriptions are over {MESSAGE_BYTES} bytes together: keep fewer in --emulators"
            )

    def in_words(self) -> str:
        """What is offered and taken, for the log."""
        names = ", ".join(offer.name for offer in self._list.emulators) or "none"
        return f"emulators on offer: {names}; adapters are {'taken' if self._submissions is not None else 'not taken'}"

    async def List(self, request: pb.ListRequest, context: Any) -> pb.EmulatorList:  # noqa: N802 (gRPC's name)
        """Every emulator that whoever asks may have."""
        identity = peer_identity(context.auth_context())
        try:
            require_protocol(request.protocol)
            rights = self._authority.rights(identity)
        except IsthmusError as error:
            await abort(context, error)
        offers = (offer for offer in self._list.emulators if rights.emulator(offer.name, offer.bundle))
        return pb.EmulatorList(emulators=offers)

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.BundleFrame]:  # noqa: N802
        """An emulator's bundle from any offset on; its manifest and signature first."""
        identity = peer_identity(context.auth_context())
        try:
            found = self._found(identity, request.bundle)
        except IsthmusError as error:
            await abort(context, error)
        paced = partial(self._authority.paced, identity)
        async for frame in bundle_frames(found.folder, found.manifest, request.offset, context, paced):
            yield frame

    def _found(self, identity: str, bundle_id: str) -> Offered:
        self._authority.rights(identity)
        found = self._emulators.get(bundle_id)
        if found is None:
            raise BundleError("no such emulator is offered; ask for the list again")
        self._authority.require_emulator(identity, found.offer.name, bundle_id)
        return found

    async def Submit(self, frames: AsyncIterator[pb.BundleFrame], context: Any) -> pb.SubmitReceipt:  # noqa: N802
        """Take an adapter in."""
        identity = peer_identity(context.auth_context())
        try:
            self._authority.require_submit(identity)
            if self._submissions is None:
                raise ForbiddenError("this node takes no adapters: ask the model owner to serve with --submissions")
            return await self._submissions.take(identity, self._authority.arriving(identity, frames))
        except IsthmusError as error:
            await abort(context, error)

    def handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """The contract's calls, for a server."""
        calls = {
            "List": grpc.unary_unary_rpc_method_handler(
                self.List, pb.ListRequest.FromString, pb.EmulatorList.SerializeToString
            ),
            "Fetch": grpc.unary_stream_rpc_method_handler(
                self.Fetch, pb.FetchRequest.FromString, pb.BundleFrame.SerializeToString
            ),
            "Submit": grpc.stream_unary_rpc_method_handler(
                self.Submit, pb.BundleFrame.FromString, pb.SubmitReceipt.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler("isthmus.v1.Offsite", calls)


def read_emulators(directory: Path, model: Model, publisher: Ed25519PublicKey | None) -> list[Offered]:
    """The emulators in `directory`, or the one that it is, each verified.

    Args:
        directory: a folder of emulators' folders, or one of those. What has no manifest there is no emulator and left
            out, with a line in the log; hidden folders are left out without.
        model: that they must be of.
        publisher: whose signature they must have; None where edges will not ask.

    Raises:
        UsageError: there are none.
        BundleError, ModelError: one is not fit to be offered; the message names it.
    """
    folders = [directory]
    if not (directory / MANIFEST).exists():
        beside = sorted(path for path in directory.glob("[!.]*") if path.is_dir())
        folders = [path for path in beside if (path / MANIFEST).exists()]
        others = [path.name for path in beside if path not in folders]
        if others:
            log.info("--emulators: without a %s, so not offered: %s", MANIFEST, ", ".join(others))
    if not folders:
        raise UsageError(f"--emulators: {directory} holds none; make one with `cloud_node emulator build`")
    return [_offered(folder, model, publisher) for folder in folders]


def limits_of(model: Model, emulators: Sequence[Offered]) -> dict[Cut, int]:
    """The most bytes that an adapter may have, for each cut that something is given out for."""
    given = [Manifest.parse((folder / MANIFEST).read_bytes()) for folder in model.ends.values()]
    given += [each.manifest for each in emulators]
    limits: dict[Cut, int] = {}
    for manifest in given:
        cut = Cut.parse(manifest.cut)
        limits[cut] = max(limits.get(cut, 0), LARGEST * manifest.total_bytes)
    return limits


def _offered(folder: Path, model: Model, publisher: Ed25519PublicKey | None) -> Offered:
    try:
        manifest = bundle.verify(folder, None)
        about = Emulator.load(folder)
        cut = Cut.parse(manifest.cut)
        cut.span(model.blocks)
    except IsthmusError as error:
        raise BundleError(
            f"emulator {folder} cannot be offered ({reason_of(error)}); build it anew, restore it, or move it away"
        ) from None
    if manifest.kind != "emulator" or about.recipe.cut != manifest.cut:
        raise BundleError(f"{folder} holds {manifest.kind} of cut {manifest.cut}, not an emulator; move it away")
    if manifest.model_digest != model.digest:
        raise ModelError(f"emulator {folder} is of another model than the one served; move it away or build it anew")
    if publisher is not None and not bundle.is_signed_by(publisher, manifest.to_bytes(), bundle.read_signature(folder)):
        raise BundleError(
            f"emulator {folder} is not signed with this node's key, and edges would refuse it; "
            "build it with the same --certs"
        )
    offer = pb.EmulatorOffer(
        bundle=manifest.id,
        bytes=manifest.total_bytes,
        bottom=cut.bottom,
        top=cut.top,
        name=folder.resolve().name,
        description=(folder / FILE_NAME).read_text(encoding="utf-8"),
        costs=_costs(folder, manifest.id),
    )
    return Offered(folder, manifest, offer)


def _costs(folder: Path, bundle_id: str) -> bytes:
    """What the emulator cost, a line for each stage; empty where no record of it stands beside its folder."""
    try:
        found = told.read(told.beside(folder))
    except BundleError as error:
        log.warning("what emulator %s cost is not told: %s", folder, error)
        return b""
    return "\n".join(found.lines()).encode() if found is not None and found.of == bundle_id else b""
