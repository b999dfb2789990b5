"""Handing a run's adapter in to the model owner: packed as a signed bundle, and sent until the server has all of it.

Knows run directories, bundles and one call; loads no weights. The text it was tuned on stays here.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from edge_client.channel import explain, open_channel
from edge_client.opening import checked_credentials, required
from edge_client.runs import RunDirectory
from edge_client.sealed_adapter import read_sealed
from edge_client.server import persistently
from edge_client.stalls import answered
from edge_client.stream import waiting
from isthmus import bundle, held_bundle
from isthmus.bundle import MANIFEST, SIGNATURE, Manifest
from isthmus.errors import BundleError, RunError, UsageError, WireError
from isthmus.ledger.record import Ledger
from isthmus.report.costs import traffic_of
from isthmus.report.evaluated import Submitted, note_submission
from isthmus.report.schema import RunReport
from isthmus.report.stages import stage_of
from isthmus.report.units import size
from isthmus.training.progress import Meter, meter
from isthmus.trust.credentials import Credentials
from isthmus.wire.frames import sent_bytes
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Packed:
    """An adapter as a signed bundle, and how its bytes are read, from the start each time."""

    manifest: Manifest
    signature: bytes
    read: Callable[[], Iterator[tuple[int, bytes]]]


def submit(
    run: Path,
    server: str | None,
    certs: Path | None,
    insecure: bool,
    console: Console,
    key_file: Path | None = None,
) -> pb.SubmitReceipt:
    """Send a run's adapter to the model owner, who checks it while this waits; its ledger and report have the bytes.

    Args:
        run: directory of a run that is done.
        server: HOST:PORT; None is the run's own.
        certs: this edge's identity, which signs; None is the run's own, if it had one.
        insecure: speak to another machine in plaintext.
        console: where progress is shown.
        key_file: opens a sealed run; None: the run's, or a passphrase. What was sealed is not written to a disk here.

    Raises:
        RunError: the run is not done, has no adapter, is of no known model, or its ledger cannot be written.
        WireError: the server took something else, it says.
        UsageError: no server is known, or it would be spoken to in plaintext unasked.
        IsthmusError: the server refuses, with its reason, or cannot be reached.
    """
    directory = RunDirectory(run)
    config = directory.config()
    address = server or config.server
    if address is None:
        why = "was --method local" if config.method == "local" else "had its emulator from a folder"
        raise UsageError(f"--server is needed: the run knows none, since it {why}")
    credentials = checked_credentials(address, **config.trusting(certs, insecure))
    key = credentials.signing_key() if credentials is not None else Ed25519PrivateKey.generate()
    directory.unlock(key_file or config.key_file)
    with tempfile.TemporaryDirectory() as scratch, directory.locked():
        packed, began = packed_from(directory, Path(scratch), key), time.perf_counter()
        manifest = packed.manifest
        with counted(directory) as ledger, meter(console, "submit the adapter, %", 100) as progress:
            receipt = persistently(lambda: _send(address, credentials, packed, ledger, progress))
        seconds = time.perf_counter() - began
    if receipt.bundle != manifest.id:
        raise WireError(
            f"the server says that it took another adapter than {manifest.id}, which was sent; ask its owner"
        )
    cost = stage_of(ledger, "submit", seconds=seconds, stored_bytes=manifest.total_bytes)
    adapter = directory.adapter_digest()
    if cost is not None and adapter is not None:
        note_submission(run, Submitted(bundle=manifest.id, adapter=adapter, cost=cost))
    return receipt


@contextmanager
def counted(directory: RunDirectory) -> Iterator[Ledger]:
    """A ledger of its own, whose figures go to the run's ledger and report in the end, whatever comes of it.

    Raises:
        RunError: the ledger or the report cannot be read or written.
    """
    spent, ledger, report = Ledger(), directory.ledger(), RunReport.load(directory.path)
    try:
        yield spent
    finally:
        ledger.add("submit", at=None, **spent.totals("submit"))
        ledger.close_step(report.steps)
        phases = report.cost.wire.by_phase.model_copy(update={"submit": traffic_of(ledger, "submit")})
        cost = report.cost.model_copy(update={"wire": report.cost.wire.model_copy(update={"by_phase": phases})})
        try:
            report.model_copy(update={"cost": cost}).save(directory.path)
        except OSError as error:
            raise RunError(f"{directory.path}: cannot write the report: {error.strerror}; make room") from None


def packed_from(directory: RunDirectory, folder: Path, key: Ed25519PrivateKey) -> Packed:
    """A run's adapter as a bundle: in an empty folder, or, where it is sealed, in memory alone.

    Raises:
        RunError, BundleError: as `pack`.
    """
    if directory.seal is None:
        manifest = pack(directory.path, folder, key)
        return Packed(manifest, bundle.read_signature(folder), lambda: bundle.read(folder, manifest, 0))
    report = _done(directory.path)
    files, about = read_sealed(directory.trained(), directory.seal), _about(report)
    if MANIFEST in files:
        about |= held_bundle.verify(files, None).about
    digest, cut = required(report.model_digest, "a model"), required(report.cut, "a cut")
    made, signature = held_bundle.signed(files, "adapter", digest, cut, about, key)
    return Packed(made, signature, lambda: held_bundle.read(files, made))


def pack(run: Path, folder: Path, key: Ed25519PrivateKey) -> Manifest:
    """Put a run's adapter into an empty folder as a bundle; the same run gives the same bundle.

    Raises:
        RunError: the run is not done, has no adapter, or is of no known model.
        BundleError: the adapter is damaged, or cannot be in a bundle.
    """
    report, adapter = _done(run), RunDirectory(run).trained()
    about = _about(report)
    if (adapter / MANIFEST).exists():
        about |= bundle.verify(adapter, None).about
    try:
        for path in adapter.iterdir():
            if path.name not in (MANIFEST, SIGNATURE):
                shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise BundleError(f"{adapter} cannot be packed ({error.strerror}): check its files and the disk") from None
    digest, cut = required(report.model_digest, "a model"), required(report.cut, "a cut")
    return bundle.write(folder, "adapter", digest, cut, about, key)


def _done(run: Path) -> RunReport:
    """The report of a run that is done and says what it is of."""
    report = RunReport.load(run)
    if report.status not in (None, "complete"):  # older reports do not say
        again = f"go on with `edge_client train --resume --out {run}`, and submit then"
        raise RunError(f"{run} is not done: it ended {report.status} after step {report.steps}; {again}")
    if report.model_digest is None or report.cut is None:
        raise RunError(f"{run} does not say which model and cut it is of; submit a run against a server or an emulator")
    return report


def _about(report: RunReport) -> dict[str, bundle.Scalar]:
    about: dict[str, bundle.Scalar] = {
        "method": report.peft_type,
        "format": report.adapter_format,
        "run": report.method,  # adapters of `dlora` are in the span
    }
    if report.offsite is not None:
        about["emulator"] = report.offsite.emulator  # the bundle's id
    return about


def _send(
    address: str, credentials: Credentials | None, packed: Packed, ledger: Ledger, progress: Meter
) -> pb.SubmitReceipt:
    with waiting(ledger, "submit"), open_channel(address, credentials) as channel:
        try:
            frames = _counted(_frames(packed, progress), ledger)
            stub = pb_grpc.OffsiteStub(channel)  # type: ignore[no-untyped-call]
            answer: pb.SubmitReceipt = answered(stub.Submit.future, frames)
        except grpc.RpcError as error:
            raise explain(error, address, credentials) from None
    ledger.add("submit", down_bytes=sent_bytes(answer), down_payload_bytes=0, round_trips=1)
    return answer


def _counted(frames: Iterable[pb.BundleFrame], ledger: Ledger) -> Iterator[pb.BundleFrame]:
    for frame in frames:
        ledger.add("submit", up_bytes=sent_bytes(frame), up_payload_bytes=len(frame.data))
        yield frame


def _frames(packed: Packed, progress: Meter) -> Iterator[pb.BundleFrame]:
    manifest = packed.manifest
    yield pb.BundleFrame(manifest=manifest.to_bytes(), signature=packed.signature)
    for offset, data in packed.read():
        yield pb.BundleFrame(offset=offset, data=data)
        done = offset + len(data)
        progress.update(100 * done // manifest.total_bytes, f"{size(done)} of {size(manifest.total_bytes)}")
