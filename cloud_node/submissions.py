"""Adapters that edges hand in: judged before anything is written, checked before anything stays.

Knows bundles, identities and a folder of this node alone; what an adapter's tensors must be is asked of whoever knows
the model. Under the folder each identity has one of its own, and in it each submission by its bundle's id.
"""

import asyncio
import hashlib
import logging
import re
import secrets
import shlex
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloud_node.arriving import first_of, on_disk, receive
from isthmus import bundle
from isthmus.adapter_files import FILES
from isthmus.bundle import Manifest
from isthmus.cut import Cut
from isthmus.durable import sync
from isthmus.errors import (
    BundleError,
    CertificateError,
    CutError,
    ForbiddenError,
    IsthmusError,
    LimitError,
    WireError,
)
from isthmus.faults import Fault, passing
from isthmus.receiver import Receiver
from isthmus.trust import signing
from isthmus.wire.gen import backbone_pb2 as pb

log = logging.getLogger(__name__)

KEPT = 16
"""Submissions kept for each identity."""

_ARRIVING = ".arriving-"
_EDGE = re.compile(r"spiffe://isthmus/edge/([a-z0-9][a-z0-9._-]{0,62})")


class Submissions:
    """Takes in adapters of one model, one at a time from each identity."""

    def __init__(
        self,
        directory: Path,
        model_digest: str,
        limits: Mapping[Cut, int],
        signers: Path | None,
        check: Callable[[Path], object],
        model: Path,
    ) -> None:
        """Keep them in `directory`, from which is removed what a node that was killed was still receiving.

        Args:
            directory: made if need be; no other node may use it.
            model_digest: of the model that adapters must be of.
            limits: the most bytes that an adapter may have, for each cut that there may be adapters of.
            signers: folder of the edges' public signing keys, NAME.pub; None takes any signature.
            check: told the folder of an adapter, raises a BundleError where it does not fit the model.
            model: its folder, for the command that is logged.

        Raises:
            BundleError: the directory cannot be written.
        """
        self._directory = directory.absolute()
        self._model_digest = model_digest
        self._limits = limits
        self._signers = signers
        self._check = check
        self._model = model
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in self._directory.glob(f"*/{_ARRIVING}*"):
                shutil.rmtree(left)
        except OSError as error:
            raise BundleError(f"{directory} cannot be written ({error.strerror}): choose other --submissions") from None

    async def take(self, identity: str, frames: AsyncIterator[pb.BundleFrame]) -> pb.SubmitReceipt:
        """Receive a submission of `identity`; the same one may come again.

        Raises:
            ForbiddenError: signers are asked for, and this identity has no key there.
            LimitError: it is too large, or the identity has too many.
            BundleError, CutError: it is damaged, of another signer or model, or no adapter that fits. Of whatever is
                refused nothing stays.
            WireError, UnreachableError: the frames are not those of a bundle, or stop coming.
        """
        what = "a submission"
        try:
            signer = self._signer(identity)
            first = await first_of(frames)
            manifest = self._judged(first, signer)
            what = f"submission {manifest.id}"
            async with self._turns[identity]:
                receipt = await self._received(self._directory / folder_of(identity), manifest, signer, first, frames)
        except IsthmusError as error:
            log.info("%s of %s refused: %s", what, identity, " ".join(str(error).split()))
            raise self._told(error) from None
        self._log_taken(identity, receipt)
        return receipt

    def _log_taken(self, identity: str, receipt: pb.SubmitReceipt) -> None:
        state = "was here already" if receipt.already else "taken"
        command = shlex.join(self._plug_in(identity, receipt.bundle))
        log.info("submission %s of %s %s; next: %s", receipt.bundle, identity, state, command)

    def _plug_in(self, identity: str, submission: str) -> list[str]:
        """What the owner may run next; `--out` is under the folder that it is run in."""
        home = folder_of(identity)
        key = self._key_file(identity)
        return [
            *("cloud_node", "plug-in", "--model", str(self._model.absolute())),
            *("--adapter", str(self._directory / home / submission)),
            *(() if key is None else ("--signer", str(key.absolute()))),
            *("--out", f"plugged-in/{home}-{submission[:8]}"),
        ]

    def _signer(self, identity: str) -> Ed25519PublicKey | None:
        if self._signers is None:
            return None
        key = self._key_file(identity)
        with suppress(CertificateError):
            if key is not None:
                return signing.load_public(key)
        raise ForbiddenError(f"this node has no signing key of {identity}: ask the model owner to add it to --signers")

    def _key_file(self, identity: str) -> Path | None:
        named = _EDGE.fullmatch(identity)
        return None if self._signers is None or named is None else self._signers / f"{named[1]}.pub"

    def _judged(self, first: pb.BundleFrame, signer: Ed25519PublicKey | None) -> Manifest:
        """The manifest, if what it announces may come."""
        if not first.manifest or len(first.signature) != signing.SIGNATURE_BYTES:
            raise WireError("a submission begins with its manifest and signature; match the versions")
        if signer is not None and not bundle.is_signed_by(signer, first.manifest, first.signature):
            raise BundleError("the submission's signature is not its sender's: submit with the --certs it was issued")
        manifest = Manifest.parse(first.manifest)
        if manifest.kind != "adapter":
            raise BundleError(f"a submission is of kind adapter, not {manifest.kind}: submit a run")
        if manifest.model_digest != self._model_digest:
            raise BundleError("the adapter is of another model than this node's: submit it where its emulator is from")
        limit = self._limits.get(Cut.parse(manifest.cut))
        if limit is None:
            known = ", ".join(map(str, sorted(self._limits)))
            raise CutError(f"the adapter is for cut {manifest.cut}, and this node gives out {known}")
        if manifest.total_bytes > limit:
            raise LimitError(
                f"the adapter has {manifest.total_bytes} bytes, and this node takes {limit} at cut {manifest.cut}, "
                "twice the largest bundle that it gives out there: train fewer weights"
            )
        if {entry.name for entry in manifest.files} not in FILES.values():
            raise BundleError("the submission's files are not those of an adapter: submit a run as it was saved")
        return manifest

    async def _received(
        self,
        home: Path,
        manifest: Manifest,
        signer: Ed25519PublicKey | None,
        first: pb.BundleFrame,
        frames: AsyncIterator[pb.BundleFrame],
    ) -> pb.SubmitReceipt:
        kept = home / manifest.id
        if await asyncio.to_thread(_is_whole, kept, signer):
            return pb.SubmitReceipt(bundle=manifest.id, already=True)
        if len([folder for folder in home.glob("[!.]*") if folder != kept]) >= KEPT:
            raise LimitError(f"this node keeps {KEPT} submissions of yours already: ask the model owner to remove some")
        arriving = home / f"{_ARRIVING}{secrets.token_hex(4)}"
        try:
            ready = await receive(Receiver(arriving, manifest.id, None), first, frames)
            await asyncio.to_thread(self._check, ready)
            await on_disk(_keep, ready, kept)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
            with suppress(OSError):
                home.rmdir()
        return pb.SubmitReceipt(bundle=manifest.id)

    def _told(self, error: IsthmusError) -> IsthmusError:
        """The error without this node's folders, which are no business of the edge's."""
        return type(error)(re.sub(rf"{re.escape(str(self._directory))}/(\S*/)?", "", str(error)))


def folder_of(identity: str) -> str:
    """A safe folder's name for an identity, and for no other."""
    readable = re.sub(r"[^a-z0-9]+", "-", identity.rpartition("/")[2].lower())[:64]
    return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _is_whole(kept: Path, signer: Ed25519PublicKey | None) -> bool:
    try:
        return bundle.verify(kept, signer).id == kept.name
    except BundleError:
        return False


def _keep(ready: Path, kept: Path) -> None:
    shutil.rmtree(kept, ignore_errors=True)  # an earlier one, damaged since
    try:
        passing(Fault.SUBMISSION_BEFORE_STORE)
        ready.rename(kept)
        sync(kept.parent)
        passing(Fault.SUBMISSION_AFTER_STORE)
    except OSError as error:
        raise BundleError(f"the node cannot keep the submission ({error.strerror}): tell the model owner") from None
