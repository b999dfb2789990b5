"""The edge model with an emulator in its middle, and over the wire the true span that may be plugged in for it.

Knows bundles of emulators, on disk or offered by a server; trains nothing.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from torch import nn

from edge_client import owners_costs
from edge_client.config import BUNDLE_ID, TrainConfig
from edge_client.edge_model import EdgeModel, Standin
from edge_client.link import Link
from edge_client.offering import printable
from edge_client.opening import credentials_for, opening_of, required
from edge_client.passes import RemoteBackbone
from edge_client.remote import RemoteSpan
from edge_client.server import choose_cut, describe, fetch_emulator, list_emulators
from isthmus import bundle
from isthmus.blocks import BlockList, PassThrough, watch_owner
from isthmus.bundle import Manifest
from isthmus.command import cache_directory
from isthmus.cut import Cut
from isthmus.device import pick_device
from isthmus.emulated.load import load_emulated
from isthmus.errors import BundleError, UsageError, WireError
from isthmus.ledger.record import Ledger
from isthmus.ledger.told import Told
from isthmus.load import DTYPES, load_tokenizer
from isthmus.receiver import cached
from isthmus.training.outputs import select_outputs
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb

Progress = Callable[[int, int], None]

LOOK_PATIENCE_S = 5.0
"""How long a look at the true span waits for a server that went away, or does not answer: tuning needs none."""

log = logging.getLogger("edge_client")


def load_offsite(config: TrainConfig, ledger: Ledger, progress: Progress, known: str | None = None) -> EdgeModel:
    """The ends with an emulator between them.

    Args:
        config: of the run. An emulator that was fetched before needs no server, if it is named by its bundle's id.
        ledger: counts what is fetched.
        progress: called with bytes so far and bytes in all.
        known: id of the bundle that a resumed run began with.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    folder = config.emulator_folder
    directory = folder or _fetched(config, known or config.emulator, ledger, progress)
    manifest = _verified(directory, config.certs) if folder is not None else _manifest(directory)
    if manifest.kind != "emulator":
        raise BundleError(f"{directory} holds {manifest.kind}, not an emulator; name what `emulator build` made")
    emulated = load_emulated(directory, DTYPES[config.dtype])
    if str(emulated.cut) != manifest.cut:
        raise BundleError(f"{directory} says two cuts, {manifest.cut} and {emulated.cut}; have it built anew")
    if config.cut is not None and Cut.parse(config.cut) != emulated.cut:
        raise UsageError(f"the emulator is for cut {emulated.cut}, not {config.cut}; leave out --cut")
    if config.certs is None:
        log.warning("nobody vouches for this emulator: give --certs to have its signature checked")
    model = emulated.model.to(pick_device(config.device))
    select_outputs(model)
    return EdgeModel(
        model,
        emulated.found,
        emulated.cut,
        load_tokenizer(directory),
        printable(str(manifest.about.get("name", directory.name))),
        manifest.model_digest,
        config.dtype,
        standin=Standin(manifest.id, emulated.about, _costs(manifest.id, folder)),
    )


def _costs(emulator: str, folder: Path | None) -> Told | None:
    return owners_costs.kept(emulator) if folder is None else owners_costs.beside(emulator, folder)


def bundle_bytes(config: TrainConfig, emulator: str) -> int | None:
    """Bytes of the bundle that an emulator of this id was loaded from; None where it is gone by now."""
    try:
        return _manifest(config.emulator_folder or _bundles() / emulator).total_bytes
    except BundleError:
        return None


def _bundles() -> Path:
    return cache_directory() / "bundles"


def _verified(directory: Path, certs: Path | None) -> Manifest:
    """What the manifest in a folder says, of an emulator that is whole and, where there are certificates, signed."""
    if not (directory / bundle.MANIFEST).is_file():
        raise UsageError(f"{directory} is no emulator; {_instead_of(directory)}")
    publisher = _publisher(certs)
    signed = _manifest(directory).to_bytes(), bundle.read_signature(directory)
    if publisher is not None and not bundle.is_signed_by(publisher, *signed):
        raise BundleError(
            f"{directory} is not signed by the model owner, whose key is {certs}/publisher.pub: ask for one that "
            "`cloud_node emulator build --certs` made, or leave out --certs if you trust whoever gave it to you"
        )
    return bundle.verify(directory, publisher)


def _instead_of(directory: Path) -> str:
    """What to name instead of a folder that is no emulator."""
    within = sorted(manifest.parent.name for manifest in directory.glob(f"*/{bundle.MANIFEST}"))
    if within:
        return f"in it are {', '.join(map(printable, within))}: name one, such as {directory / printable(within[0])}"
    return "name a folder that `cloud_node emulator build` made"


def _manifest(directory: Path) -> Manifest:
    """What a bundle in the cache says that was verified on its way here: hashing it takes seconds."""
    with bundle.open_listed(directory, bundle.MANIFEST) as file:
        return Manifest.parse(file.read(bundle.MAX_MANIFEST_BYTES + 1))


def _publisher(certs: Path | None) -> Ed25519PublicKey | None:
    return Credentials.load(certs).publisher() if certs is not None else None


def _fetched(config: TrainConfig, asked: str | None, ledger: Ledger, progress: Progress) -> Path:
    """The verified folder of the emulator that was asked for, by id or name, or of the only one offered for the cut.

    A server that is spoken to must serve the model that the emulator is of.
    """
    bundles = _bundles()
    if asked is not None and BUNDLE_ID.fullmatch(asked):
        here = cached(bundles, asked, _publisher(config.certs))
        if here is not None:
            return here
    address = required(config.server, "--server")
    credentials = credentials_for(config, address)
    served = describe(address, credentials, ledger).model_digest
    offer = _chosen(list_emulators(address, credentials, ledger), asked, config.cut)
    owners_costs.keep(offer.bundle, offer.costs)
    here = cached(bundles, offer.bundle, _publisher(config.certs))
    if here is None:
        return fetch_emulator(address, credentials, offer, served, bundles, ledger, progress)
    if _manifest(here).model_digest != served:
        raise WireError("the emulator is of another model than the one that the server serves; ask the model owner")
    return here


def _chosen(offers: list[pb.EmulatorOffer], asked: str | None, cut: str | None) -> pb.EmulatorOffer:
    """The one that was asked for, or the only one for the cut: which of several is the user's choice."""
    known = ", ".join(f"{printable(offer.name)} (cut {Cut(offer.bottom, offer.top)})" for offer in offers) or "none"
    named = [offer for offer in offers if asked in (None, offer.name, offer.bundle)]
    fitting = [offer for offer in named if cut in (None, str(Cut(offer.bottom, offer.top)))]
    if asked is not None and named and not fitting:
        raise UsageError(f"{asked} is for cut {Cut(named[0].bottom, named[0].top)}, not {cut}; leave out --cut")
    if not fitting:
        hint = "" if asked is None else f"; a folder is named by its path, such as ./{asked}"
        raise UsageError(f"the server offers no such emulator; it offers {known}{hint}")
    if len(fitting) > 1:
        raise UsageError(
            f"the server offers {known}; choose with --emulator NAME (`edge_client emulators` says how they differ)"
        )
    return fitting[0]


def plug_in_over_the_wire(config: TrainConfig, edge: EdgeModel, ledger: Ledger) -> None:
    """Let the true span be plugged in for looks, which send hidden states and wait a few seconds at most.

    Raises:
        BundleError: the emulator is of another model than the one served.
        IsthmusError: the server cannot be reached, or refuses.
    """
    address = required(config.server, "--server")
    credentials = credentials_for(config, address)
    card = describe(address, credentials, ledger, LOOK_PATIENCE_S)
    choose_cut(card, str(edge.cut))
    if card.model_digest != edge.digest:
        raise BundleError("the emulator is of another model than the server's; fetch one from this server")
    opening = opening_of(config, edge.cut, card, (), forward_only=True)
    patience = min(config.patience, LOOK_PATIENCE_S)
    link = Link(address, credentials, opening, ledger, card.limits, patience, config.pace)
    link.open()
    edge.link, edge.row_tokens = link, card.limits.row_tokens
    edge.remote = RemoteBackbone(link, ledger, config.codec, config.gradient_codec, config.port_codec)
    edge.true_span = _true_span(edge.found, edge.cut, edge.remote)


def _true_span(found: BlockList, cut: Cut, remote: RemoteBackbone) -> dict[int, nn.Module]:
    watch_owner(found.owner)
    first, *rest = cut.span(len(found.blocks))
    passing = {number: PassThrough(number, found.returns_tuple, found.blocks[number]) for number in rest}
    return {first: RemoteSpan(first, found, remote, topmost=cut.top == 0), **passing}
