"""What an edge asks a cloud node before a session: the model card, emulators, and verified bundles of either's weights.

Knows four calls and the bundle cache; builds no model.
"""

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message

from edge_client.channel import explain, open_channel
from edge_client.retrying import PATIENCE_S, Retrying, retry_after
from edge_client.stalls import arriving as unstalled
from edge_client.stream import waiting
from isthmus import PROTOCOL, __version__, bundle, receiver
from isthmus.cut import Cut
from isthmus.durable import write_whole
from isthmus.errors import (
    CutError,
    InterruptedRunError,
    IsthmusError,
    UnreachableError,
    VersionError,
    WireError,
)
from isthmus.ledger.record import Ledger
from isthmus.report import units
from isthmus.trust.credentials import Credentials
from isthmus.wire.frames import sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc

ANSWER_WITHIN_S = 20.0
ATTEMPTS = 5
"""Of which none gets any further."""

Progress: TypeAlias = Callable[[int, int], None]
"""Told the bytes so far and the bytes in all."""

Result = TypeVar("Result")


def describe(
    address: str, credentials: Credentials | None, ledger: Ledger, within_s: float = ANSWER_WITHIN_S
) -> pb.ModelCard:
    """The model card; the server has `within_s` seconds to answer.

    Raises:
        UnreachableError, CertificateError, VersionError: with what to do about it.
    """
    request = pb.DescribeRequest(protocol=PROTOCOL, client_version=__version__)
    card: pb.ModelCard = _answer(
        address,
        credentials,
        ledger,
        request,
        lambda channel: pb_grpc.BackboneStub(channel).Describe,  # type: ignore[no-untyped-call]
        within_s,
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
    progress: Progress,
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
    wanted = _Wanted("ends", offer.ends_bundle, offer.ends_bytes, Cut(offer.bottom, offer.top))
    return _fetch(address, credentials, wanted, model_digest, cache, ledger, progress)


def list_emulators(address: str, credentials: Credentials | None, ledger: Ledger) -> list[pb.EmulatorOffer]:
    """The emulators that a server offers, in its order.

    Raises:
        UnreachableError, CertificateError, VersionError: with what to do about it.
    """
    request = pb.ListRequest(protocol=PROTOCOL)
    answer: pb.EmulatorList = _answer(
        address,
        credentials,
        ledger,
        request,
        lambda channel: pb_grpc.OffsiteStub(channel).List,  # type: ignore[no-untyped-call]
    )
    return list(answer.emulators)


def fetch_emulator(
    address: str,
    credentials: Credentials | None,
    offer: pb.EmulatorOffer,
    model_digest: str | None,
    cache: Path,
    ledger: Ledger,
    progress: Progress,
) -> Path:
    """The folder of an emulator, as `fetch_ends`; `model_digest` is of the model that it must be of, None takes any.

    Raises:
        BundleError: the bundle is not what was announced or signed.
        IsthmusError: the server refuses or cannot be reached.
    """
    wanted = _Wanted("emulator", offer.bundle, offer.bytes, Cut(offer.bottom, offer.top))
    return _fetch(address, credentials, wanted, model_digest, cache, ledger, progress)


def persistently(once: Callable[[], Result], done: Callable[[], int] = lambda: 0) -> Result:
    """What `once` returns; it is tried again, with growing pauses, after errors that this can help.

    `ATTEMPTS` in a row are made that do not bring `done()` further; a server that says when is waited for.

    Raises:
        IsthmusError: the last try's, or the first that trying again cannot help.
    """
    failed, reached = 0, done()
    while True:
        try:
            return once()
        except IsthmusError as error:
            failed, reached = (1 if done() > reached else failed + 1), done()
            told = retry_after(error)
            if failed >= ATTEMPTS or not (error.retryable or (told is not None and told <= PATIENCE_S)):
                raise
        growing = random.uniform(0.5, 1.5) * 2 ** (failed - 1)  # noqa: S311 (jitter, not secrecy)
        time.sleep(growing if told is None else told + growing)


def once_it_may(once: Callable[[], Result], retrying: Retrying) -> Result:
    """What `once` returns; a server that says when it would answer is waited for, as long as patience lasts.

    Raises:
        IsthmusError: whatever else it raises.
    """
    while True:
        try:
            return once()
        except IsthmusError as error:
            wait_s = retrying.delay(error)
            if wait_s is None:
                raise
        time.sleep(wait_s)


def _answer(
    address: str,
    credentials: Credentials | None,
    ledger: Ledger,
    request: Message,
    call: Callable[[grpc.Channel], Callable[..., Any]],
    within_s: float = ANSWER_WITHIN_S,
) -> Any:
    """What a call answers to its one request; both are counted."""

    def once() -> Any:
        with waiting(ledger, "control"), open_channel(address, credentials) as channel:
            try:
                return call(channel)(request, timeout=within_s)
            except grpc.RpcError as error:
                raise explain(error, address, credentials) from None

    answer = once_it_may(once, Retrying())
    ledger.add("control", up_bytes=sent_bytes(request), down_bytes=sent_bytes(answer))
    return answer


@dataclass(frozen=True)
class _Wanted:
    """What a server said of a bundle before it was fetched."""

    kind: Literal["ends", "emulator"]
    id: str
    bytes: int
    cut: Cut


def _fetch(
    address: str,
    credentials: Credentials | None,
    wanted: _Wanted,
    model_digest: str | None,
    cache: Path,
    ledger: Ledger,
    progress: Progress,
) -> Path:
    publisher = credentials.publisher() if credentials is not None else None
    found = receiver.cached(cache, wanted.id, publisher)
    if found is None:
        arriving = receiver.Receiver(cache, wanted.id, publisher)
        with _kept(arriving, wanted):
            found = persistently(
                lambda: _fetch_once(address, credentials, arriving, wanted, ledger, progress), lambda: arriving.offset
            )
    manifest = bundle.verify(found, publisher)
    if manifest.kind != wanted.kind or Cut.parse(manifest.cut) != wanted.cut:
        raise WireError(f"the server offered {wanted.kind} of cut {wanted.cut} and sent another; ask the model owner")
    if model_digest not in (None, manifest.model_digest):
        raise WireError(f"the bundle of {wanted.kind} is of another model than the one asked for; ask the model owner")
    return found


@contextmanager
def _kept(arriving: receiver.Receiver, wanted: _Wanted) -> Iterator[None]:
    """A fetch that is stopped, or whose server goes away, says in here how much of it is kept."""

    def so_far() -> str:
        done, whole = units.size(arriving.offset), units.size(wanted.bytes)
        return f"{done} of the {whole} of the {wanted.kind} are here; the same command goes on from there"

    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"the fetch was stopped: {so_far()}") from None
    except IsthmusError as error:
        if not (error.retryable and arriving.offset):
            raise
        raise type(error)(f"{error}; {so_far()}") from None


def _fetch_once(
    address: str,
    credentials: Credentials | None,
    arriving: receiver.Receiver,
    wanted: _Wanted,
    ledger: Ledger,
    progress: Progress,
) -> Path:
    request = pb.FetchRequest(bundle=wanted.id, offset=arriving.offset)
    ledger.add("fetch", up_bytes=sent_bytes(request), up_payload_bytes=0)
    with waiting(ledger, "fetch"), open_channel(address, credentials) as channel:
        try:
            for frame in _frames(channel, wanted, request):
                ledger.add("fetch", down_bytes=sent_bytes(frame), down_payload_bytes=len(frame.data))
                if frame.manifest:
                    arriving.begin(frame.manifest, frame.signature)
                else:
                    arriving.add(frame.offset, frame.data)
                    progress(frame.offset + len(frame.data), wanted.bytes)
        except grpc.RpcError as error:
            found: IsthmusError = explain(error, address, credentials)
            raise found from None
    return arriving.finish()


def _frames(channel: grpc.Channel, wanted: _Wanted, request: pb.FetchRequest) -> Iterator[pb.BundleFrame]:
    backbone, offsite = pb_grpc.BackboneStub(channel), pb_grpc.OffsiteStub(channel)  # type: ignore[no-untyped-call]
    call = backbone.FetchEnds if wanted.kind == "ends" else offsite.Fetch
    return cast("Iterator[pb.BundleFrame]", unstalled(call(request)))
