"""An emulator reaches an edge as its owner signed it or not at all; an interrupted fetch goes on where it stopped."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_node.offsite import OffsiteService, read_emulators
from cloud_node.service import Model
from edge_client import server as calls
from edge_client.server import choose_cut, describe, fetch_emulator, list_emulators
from isthmus import bundle
from isthmus.emulated.load import load_emulated
from isthmus.emulated.recipe import Emulator
from isthmus.errors import (
    BundleError,
    InterruptedRunError,
    IsthmusError,
    LimitError,
    ModelError,
    UnreachableError,
    UsageError,
    WireError,
)
from isthmus.ledger.record import Ledger
from isthmus.load import model_digest
from isthmus.wire.gen import backbone_pb2 as pb
from tests.harness import Server, run_command
from tests.offsite.by_hand import flip, make_emulator, resign
from tests.offsite.conftest import Node


def offered(node: Node, name: str) -> pb.EmulatorOffer:
    offers = list_emulators(node.server.address, node.identity("alice"), Ledger())
    return next(offer for offer in offers if offer.name == name)


def fetch(
    node: Node,
    offer: pb.EmulatorOffer,
    cache: Path,
    ledger: Ledger | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
    digest: str | None = None,
) -> Path:
    alice = node.identity("alice")
    return fetch_emulator(node.server.address, alice, offer, digest, cache, ledger or Ledger(), progress)


@pytest.fixture
def victim(node: Node) -> Iterator[Path]:
    """An emulator's folder on the owner's disk that a test may spoil while the node runs."""
    folder = node.emulators / "victim"
    safe = shutil.copytree(folder, node.emulators.parent / "safe")
    yield folder
    shutil.rmtree(folder)
    safe.rename(folder)


def test_the_list_says_what_each_emulator_is(node: Node) -> None:
    ledger = Ledger()
    offers = list_emulators(node.server.address, node.identity("alice"), ledger)
    assert [(offer.name, offer.bottom, offer.top) for offer in offers] == [
        ("half", 1, 1),
        ("large", 2, 1),
        ("victim", 2, 0),
    ]
    for offer in offers:
        manifest = bundle.verify(node.emulators / offer.name, node.publisher.public_key())
        assert (offer.bundle, offer.bytes) == (manifest.id, manifest.total_bytes)
        assert Emulator.parse(offer.description) == Emulator.load(node.emulators / offer.name)
    assert ledger.total("control", "down_bytes") > sum(len(offer.description) for offer in offers)


def test_a_node_without_emulators_lists_none(servers: dict[str, Server]) -> None:
    assert list_emulators(servers["llama"].address, None, Ledger()) == []


def test_a_fetched_emulator_is_the_owners_and_loads_and_is_fetched_once(node: Node, tmp_path: Path) -> None:
    offer, first, again = offered(node, "half"), Ledger(), Ledger()
    seen: list[tuple[int, int]] = []
    folder = fetch(node, offer, tmp_path, first, lambda *at: seen.append(at), model_digest(node.model))
    for path in (node.emulators / "half").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert first.total("fetch", "down_payload_bytes") == offer.bytes
    assert seen[-1] == (offer.bytes, offer.bytes)
    assert load_emulated(folder, torch.float32).about.recipe.blocks == (1, None, None, 4)
    assert fetch(node, offer, tmp_path, again) == folder
    assert again.totals("fetch") == {}


def test_an_interrupted_fetch_goes_on_where_it_stopped(node: Node, tmp_path: Path) -> None:
    offer, torn, rest = offered(node, "large"), Ledger(), Ledger()

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="the same command goes on from there"):
        fetch(node, offer, tmp_path, torn, interrupt)
    had = torn.total("fetch", "down_payload_bytes")
    assert offer.bytes // 2 < had < offer.bytes
    fetch(node, offer, tmp_path, rest)
    assert rest.total("fetch", "down_payload_bytes") == offer.bytes - had


def test_a_fetch_whose_line_is_lost_tries_again_and_counts_every_byte_once(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer, ledger, pauses, real, tries = offered(node, "large"), Ledger(), [], calls._frames, []

    def losing(channel: object, wanted: object, request: pb.FetchRequest) -> Iterator[pb.BundleFrame]:
        tries.append(request.offset)
        for number, frame in enumerate(real(channel, wanted, request)):  # type: ignore[arg-type]
            if number == 2 and len(tries) < 3:
                raise UnreachableError("the line is lost")
            yield frame

    monkeypatch.setattr(calls, "_frames", losing)
    monkeypatch.setattr(calls.time, "sleep", pauses.append)
    fetch(node, offer, tmp_path, ledger)
    assert len(tries) == 3
    assert tries[0] == 0 < tries[1] < tries[2]
    assert len(pauses) == 2
    assert min(pauses) > 0  # how long is chosen by chance
    assert ledger.total("fetch", "down_payload_bytes") == offer.bytes


def test_what_is_tampered_with_on_the_owners_disk_is_refused_by_the_edge(
    node: Node, victim: Path, tmp_path: Path
) -> None:
    offer = offered(node, "victim")
    flip(victim / "model.safetensors")
    with pytest.raises(BundleError, match=r"model\.safetensors is not what its hash says"):
        fetch(node, offer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_truncated_on_the_owners_disk_is_refused_with_the_reason(
    node: Node, victim: Path, tmp_path: Path
) -> None:
    offer, path = offered(node, "victim"), victim / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BundleError, match=r"model\.safetensors became shorter"):
        fetch(node, offer, tmp_path)


def test_what_another_publisher_signed_is_refused_before_any_of_it_is_kept(
    node: Node, victim: Path, tmp_path: Path
) -> None:
    offer = offered(node, "victim")
    resign(victim, Ed25519PrivateKey.generate())
    ledger = Ledger()
    with pytest.raises(BundleError, match="signature is not the publisher's"):
        fetch(node, offer, tmp_path, ledger)
    assert list(tmp_path.iterdir()) == []
    assert ledger.total("fetch", "down_payload_bytes") == 0


def test_a_cached_copy_with_another_signature_is_not_believed(node: Node, tmp_path: Path) -> None:
    offer = offered(node, "half")
    stale = Path(shutil.copytree(node.emulators / "half", tmp_path / offer.bundle))
    resign(stale, Ed25519PrivateKey.generate())
    ledger = Ledger()
    folder = fetch(node, offer, tmp_path, ledger)
    assert ledger.total("fetch", "down_payload_bytes") == offer.bytes
    bundle.verify(folder, node.publisher.public_key())


def test_an_emulator_of_another_model_cut_or_kind_is_refused(node: Node, tmp_path: Path) -> None:
    offer, alice = offered(node, "half"), node.identity("alice")
    with pytest.raises(WireError, match="another model"):
        fetch(node, offer, tmp_path, digest="f" * 64)
    moved = pb.EmulatorOffer(bundle=offer.bundle, bytes=offer.bytes, bottom=2, top=1)
    with pytest.raises(WireError, match="emulator of cut 2:1"):
        fetch(node, moved, tmp_path)
    _, ends = choose_cut(describe(node.server.address, alice, Ledger()), None)
    with pytest.raises(BundleError, match="no such emulator"):
        fetch(node, pb.EmulatorOffer(bundle=ends.ends_bundle, bottom=1, top=1), tmp_path)


# ---- what a node refuses to offer


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> Model:
    return Model("tiny", model_digest(tiny_models["llama"]), "{}", 6, {})


KEY = Ed25519PrivateKey.generate()


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def malform(folder: Path) -> None:
    (folder / "emulator.json").write_text("{}")
    resign(folder, KEY)


def lie_about_the_cut(folder: Path) -> None:
    old = Emulator.load(folder)
    recipe = old.recipe.model_copy(update={"cut": "2:1", "blocks": (2, None, 4)})
    old.model_copy(update={"recipe": recipe}).save(folder)
    resign(folder, KEY)


@pytest.mark.parametrize(
    ("spoil", "error", "reason"),
    [
        (lambda folder: flip(folder / "model.safetensors"), BundleError, "is not what its hash says"),
        (truncate, BundleError, "bytes, not"),
        (malform, BundleError, "emulator.json is malformed"),
        (lie_about_the_cut, BundleError, "not an emulator"),
        (lambda folder: (folder / "manifest.sig").unlink(), BundleError, "manifest.sig cannot be read"),
        (lambda folder: resign(folder, KEY, kind="ends"), BundleError, "holds ends of cut 1:1, not an emulator"),
        (lambda folder: resign(folder, KEY, digest="f" * 64), ModelError, "of another model than the one served"),
        (lambda folder: resign(folder, Ed25519PrivateKey.generate()), BundleError, "not signed with this node's key"),
    ],
    ids=["tampered", "truncated", "malformed", "other cut", "no signature", "ends", "wrong base", "wrongly signed"],
)
def test_an_emulator_that_edges_would_refuse_is_not_offered_and_is_named(
    spoil: Callable[[Path], object],
    error: type[IsthmusError],
    reason: str,
    model: Model,
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    make_emulator(tmp_path / "good", tiny_models["llama"], "1:1", KEY)
    make_emulator(tmp_path / "spoilt", tiny_models["llama"], "1:1", KEY)
    assert [each.offer.name for each in read_emulators(tmp_path, model, KEY.public_key())] == ["good", "spoilt"]
    spoil(tmp_path / "spoilt")
    with pytest.raises(error, match=reason) as caught:
        read_emulators(tmp_path, model, KEY.public_key())
    assert str(tmp_path / "spoilt") in str(caught.value)
    assert "fetch" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_manifest_is_no_emulator_and_named_in_the_log(
    model: Model, tiny_models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_emulator(tmp_path / "good", tiny_models["llama"], "1:1", KEY)
    for name in ("runs", "notes"):
        (tmp_path / name).mkdir()
    with caplog.at_level("INFO"):
        assert [each.offer.name for each in read_emulators(tmp_path, model, KEY.public_key())] == ["good"]
    (line,) = caplog.messages
    assert line.endswith("not offered: notes, runs")
    (tmp_path / "notes" / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="notes cannot be offered"):
        read_emulators(tmp_path, model, None)


def test_a_folder_that_is_an_emulator_is_offered_alone_and_hidden_ones_are_not(
    model: Model, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    make_emulator(tmp_path / ".being-built", tiny_models["llama"], "1:1", KEY)
    with pytest.raises(UsageError, match="emulator build"):
        read_emulators(tmp_path, model, None)
    (alone,) = read_emulators(tmp_path / ".being-built", model, None)
    assert alone.folder == tmp_path / ".being-built"


def test_more_description_than_a_message_holds_is_refused(
    model: Model, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    make_emulator(tmp_path / "one", tiny_models["llama"], "1:1", KEY)
    path = tmp_path / "one" / "emulator.json"
    path.write_text(path.read_text() + " " * 900_000)
    resign(tmp_path / "one", KEY)
    (one,) = read_emulators(tmp_path, model, None)
    OffsiteService([one] * 4, None)
    with pytest.raises(LimitError, match="keep fewer"):
        OffsiteService([one] * 5, None)


def test_a_node_does_not_start_with_an_emulator_of_another_signer(
    node: Node, tiny_models: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    make_emulator(tmp_path / "theirs", tiny_models["llama"], "1:1", KEY)
    flags = ("--listen", "127.0.0.1:0", "--cut", "1:1", "--certs", node.owner / "server", "--emulators", tmp_path)
    done = run_command("cloud_node", "serve", "--model", tiny_models["llama"], *flags, cache=cache)
    assert done.returncode == BundleError.exit_code
    last = done.stderr.splitlines()[-1]
    assert str(tmp_path / "theirs") in last
    assert "build it with the same --certs" in last
