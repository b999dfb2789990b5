"""Submissions that do not mean well, from an edge that a real node knows: it stays as it was."""

from collections.abc import Iterable
from pathlib import Path

import grpc
import pytest

from edge_client.stream import open_channel
from isthmus import bundle
from isthmus.bundle import Manifest
from isthmus.errors import BundleError, IsthmusError
from isthmus.trust import signing
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from isthmus.wire.status import read_status
from tests.offsite.conftest import Node
from tests.offsite.test_abuse import WEIGHTS, announced


def over_the_wire(node: Node, name: str, frames: Iterable[pb.BundleFrame]) -> IsthmusError:
    with open_channel(node.server.address, node.identity(name)) as channel:
        stub = pb_grpc.OffsiteStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            stub.Submit(iter(frames), timeout=30)
    error = read_status(caught.value.details())
    assert error is not None, caught.value
    return error


def signed(node: Node, name: str, frame: pb.BundleFrame) -> pb.BundleFrame:
    key = node.identity(name).signing_key()
    return pb.BundleFrame(manifest=frame.manifest, signature=signing.sign(key, frame.manifest))


def test_path_tricks_from_a_known_edge_leave_the_node_as_it_was(node: Node) -> None:
    before = node.kept()
    for name in ("../adapter.safetensors", "/etc/adapter.safetensors", "..", "adapter.safetensors\n"):
        frame = signed(node, "carol", announced(files=[{"name": name}]))
        assert "malformed" in str(over_the_wire(node, "carol", [frame, pb.BundleFrame(data=b"x")]))
    assert node.kept() == before


def test_weights_that_are_no_weights_are_refused_by_the_check(node: Node, tmp_path: Path) -> None:
    before, offer = node.kept(), Manifest.parse((node.emulators / "half" / "manifest.json").read_bytes())
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(WEIGHTS[:5000])
    key = node.identity("carol").signing_key()
    manifest = bundle.write(folder, "adapter", offer.model_digest, "1:1", {"method": "full"}, key)
    first = pb.BundleFrame(manifest=manifest.to_bytes(), signature=bundle.read_signature(folder))
    error = over_the_wire(node, "carol", [first, pb.BundleFrame(data=WEIGHTS[:5000])])
    assert isinstance(error, BundleError)
    assert str(node.submissions) not in str(error)
    assert node.kept() == before
