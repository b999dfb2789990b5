"""A submission is stored once, whenever the node dies; sent again it gets the same receipt, and changed none."""

import io
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from cloud_node.submissions import folder_of
from edge_client.stream import open_channel
from edge_client.submitting import pack, submit
from isthmus import bundle
from isthmus.faults import Fault
from isthmus.report.evaluated import SUBMISSIONS_NAME
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from tests.kills.disturbed import Place
from tests.kills.forked import KILLED
from tests.offsite.by_hand import make_run


def hand_in(run: Path, address: str) -> pb.SubmitReceipt:
    return submit(run, address, None, False, Console(file=io.StringIO()))


def kept(submissions: Path) -> list[str]:
    """What stands under a node's folder for submissions, hidden or not, one level below its identities."""
    return sorted(path.name for path in submissions.glob("*/*"))


@pytest.mark.parametrize(
    "fault", [Fault.SUBMISSION_HALF_ARRIVED, Fault.SUBMISSION_BEFORE_STORE, Fault.SUBMISSION_AFTER_STORE]
)
def test_a_node_that_dies_over_a_submission_has_it_once_afterwards(place: Place, tmp_path: Path, fault: Fault) -> None:
    run, folder = make_run(tmp_path / "run", place.model), tmp_path / "in"
    node = place.serve("--submissions", folder, fault=fault)
    with place.reborn(node, "--submissions", folder) as others:
        receipt = hand_in(run, node.address)  # tried again by itself
        again = hand_in(run, node.address)
    assert node.code == KILLED
    assert len(others) == 1
    assert receipt.already == (fault is Fault.SUBMISSION_AFTER_STORE)
    assert (again.bundle, again.already) == (receipt.bundle, True)
    assert kept(folder) == [receipt.bundle]
    assert bundle.verify(folder / folder_of("anonymous") / receipt.bundle, None).id == receipt.bundle
    noted = (run / SUBMISSIONS_NAME).read_text().splitlines()
    assert [receipt.bundle in line for line in noted] == [True, True]


def test_another_content_under_the_id_of_a_submission_is_refused_and_what_was_taken_stays(
    place: Place, tmp_path: Path
) -> None:
    run, packed, folder = make_run(tmp_path / "run", place.model), tmp_path / "packed", tmp_path / "in"
    packed.mkdir()
    node = place.serve("--submissions", folder)
    address = node.address
    try:
        manifest = pack(run, packed, Ed25519PrivateKey.generate())
        whole = [pb.BundleFrame(manifest=manifest.to_bytes(), signature=bundle.read_signature(packed))]
        whole += [pb.BundleFrame(offset=at, data=data) for at, data in bundle.read(packed, manifest, 0)]
        changed = [*whole[:-1], pb.BundleFrame(offset=whole[-1].offset, data=bytes(len(whole[-1].data)))]
        with open_channel(address, None) as channel:
            stub = pb_grpc.OffsiteStub(channel)
            with pytest.raises(grpc.RpcError, match="not what the submission's hashes say"):
                stub.Submit(iter(changed))
            assert kept(folder) == []
            assert not stub.Submit(iter(whole)).already
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            assert stub.Submit(iter(changed)).already  # which says what is kept: none of the changed bytes were read
            other = manifest.model_copy(update={"cut": "0:3"})
            with pytest.raises(grpc.RpcError, match="gives out"):
                stub.Submit(iter([pb.BundleFrame(manifest=other.to_bytes(), signature=whole[0].signature), *whole[1:]]))
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    finally:
        node.kill()
