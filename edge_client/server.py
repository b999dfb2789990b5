"""What an edge asks a cloud node before a session: the model card, and the ends as a verified bundle.

Knows two calls and the bundle cache; builds no model.
"""

import hashlib
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

import grpc
from google.protobuf.message import DecodeError

from edge_client.link import explain
from edge_client.stream import open_channel
from isthmus import PROTOCOL, __version__, bundle, receiver
from isthmus.cut import Cut
from isthmus.durable import write_whole
from isthmus.errors import CutError, IsthmusError, UnreachableError, VersionError, WireError
from isthmus.ledger.record import Ledger
from isthmus.trust.credentials import Credentials
from isthmus.wire.frames import sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc

DESCRIBE_WITHIN_S = 20.0
FETCH_ATTEMPTS = 5


def describe(address: str, credentials: Credentials | None, ledger: Ledger) -> pb.ModelCard:
    """The model card.

    Raises:
        UnreachableError, CertificateError, VersionError: with what to do about it.
    """
    request = pb.DescribeRequest(protocol=PROTOCOL, client_version=__version__)
    with open_channel(address, credentials) as channel:
        try:
            card = cast(
                "pb.ModelCard",
                pb_grpc.BackboneStub(channel).Describe(request, timeout=DESCRIBE_WITHIN_S),  # type: ignore[no-untyped-call]
            )
        except grpc.RpcError as error:
            raise explain(error, address, credentials) from None
    ledger.add(
        "control",
        up_bytes=sent_bytes(request),
        down_bytes=sent_bytes(card),
    )
    if card.protocol != PROTOCOL:
        raise VersionError(f"the server speaks protocol {card.protocol} and this client {PROTOCOL}; match the versions")
    return card


def describe_or_recall(
    address: str, credentials: Credentials | None, ledger: Ledger, remembered: Path
) -> tuple[pb.ModelCard, bool]:
    """The model card, and whether the server gave it now; else the one that it gave before, kept in `remembered`.

    Raises:
        UnreachableError: no server answers, and it never did.
        CertificateError, VersionError: as `describe`.
    """
    trusted = credentials.publisher().public_bytes_raw() if credentials is not None else b""
    path = remembered / f"{hashlib.sha256(address.encode() + trusted).hexdigest()[:32]}.card"
    try:
        card = describe(address, credentials, ledger)
    except UnreachableError:
        known = _recall(path)
        if known is None:
            raise
        return known, False
    content = card.SerializeToString()
    with suppress(OSError):  # the card is for a day without the server; this is not that day
        remembered.mkdir(parents=True, exist_ok=True)
        write_whole(path, hashlib.sha256(content).digest() + content)
    return card, True


def _recall(path: Path) -> pb.ModelCard | None:
    """The card in a file, if it is whole: its SHA-256 stands before it."""
    try:
        stored = path.read_bytes()
        card = pb.ModelCard.FromString(stored[32:])
    except (OSError, DecodeError):
        return None
    whole = hashlib.sha256(stored[32:]).digest() == stored[:32]
    return card if whole and card.protocol == PROTOCOL else None


def choose_cut(card: pb.ModelCard, asked: str | None) -> tuple[Cut, pb.CutOffer]:
    """The cut to use: the one asked for, or the first that is offered.

    Raises:
        CutError: it is not offered.
    """
    offers = {Cut(offer.bottom, offer.top): offer for offer in card.cuts}
    if not offers:
        raise CutError("the server offers no cut")
    cut = Cut.parse(asked) if asked is not None else next(iter(offers))
    if cut not in offers:
        raise CutError(f"cut {cut} is not offered; the server offers {', '.join(map(str, offers))}")
    return cut, offers[cut]


def fetch_ends(
    address: str,
    credentials: Credentials | None,
    offer: pb.CutOffer,
    model_digest: str,
    cache: Path,
    ledger: Ledger,
    progress: Callable[[int, int], None],
) -> Path:
    """The folder of the ends, from the cache or fetched, going on where an earlier fetch stopped.

    Args:
        address: HOST:PORT of the server.
        credentials: this edge's identity; its publisher's key verifies the bundle. None checks hashes only.
        offer: which bundle.
        model_digest: of the model card; the bundle must be of the same model.
        cache: where bundles are kept.
        ledger: counts what is fetched.
        progress: called with bytes so far and bytes in all.

    Raises:
        BundleError: the bundle is not what was announced or signed.
        IsthmusError: the server refuses or cannot be reached.
    """
    found = receiver.cached(cache, offer.ends_bundle)
    if found is None:
        publisher = credentials.publisher() if credentials is not None else None
        arriving = receiver.Receiver(cache, offer.ends_bundle, publisher)
        for attempt in range(FETCH_ATTEMPTS):
            try:
                found = _fetch_once(address, credentials, arriving, offer, ledger, progress)
                break
            except IsthmusError as error:
                if not error.retryable or attempt + 1 == FETCH_ATTEMPTS:
                    raise
                time.sleep(random.uniform(0.5, 1.5) * 2**attempt)  # noqa: S311 (jitter, not secrecy)
    if found is None:
        raise UnreachableError(f"{address} did not send the ends; try again")
    manifest = bundle.verify(found, None)
    if manifest.kind != "ends" or manifest.model_digest != model_digest:
        raise WireError("the bundle of ends is of another model than the model card; ask the model owner")
    return found


def _fetch_once(
    address: str,
    credentials: Credentials | None,
    arriving: receiver.Receiver,
    offer: pb.CutOffer,
    ledger: Ledger,
    progress: Callable[[int, int], None],
) -> Path:
    request = pb.FetchRequest(bundle=offer.ends_bundle, offset=arriving.offset)
    ledger.add("fetch", up_bytes=sent_bytes(request), up_payload_bytes=0)
    with open_channel(address, credentials) as channel:
        try:
            for frame in pb_grpc.BackboneStub(channel).FetchEnds(request):  # type: ignore[no-untyped-call]
                ledger.add(
                    "fetch",
                    down_bytes=sent_bytes(frame),
                    down_payload_bytes=len(frame.data),
                )
                if frame.manifest:
                    arriving.begin(frame.manifest, frame.signature)
                else:
                    arriving.add(frame.offset, frame.data)
                    progress(frame.offset + len(frame.data), offer.ends_bytes)
        except grpc.RpcError as error:
            found: IsthmusError = explain(error, address, credentials)
            raise found from None
    return arriving.finish()
