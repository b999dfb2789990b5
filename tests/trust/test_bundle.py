"""A bundle is what its publisher signed or it is refused, on disk and in transit; an interrupted fetch goes on."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus import bundle
from isthmus import receiver as receiving
from isthmus.bundle import Manifest
from isthmus.errors import BundleError
from isthmus.receiver import Receiver, cached

KEY = Ed25519PrivateKey.generate()
PUBLISHER = KEY.public_key()
FILES = {"config.json": b"{}", "empty.txt": b"", "model.safetensors": bytes(range(256)) * 10_000, "z.model": b"last"}
ABOUT: dict[str, bundle.Scalar] = {"dtype": "float32", "keep": 0.5, "layers": 2, "tied": True, "note": None, "ü": "é"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "published"
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    bundle.write(directory, "ends", "0" * 64, "2:2", ABOUT, KEY)
    return directory


def _flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _announce(receiver: Receiver, folder: Path) -> None:
    receiver.begin((folder / "manifest.json").read_bytes(), (folder / "manifest.sig").read_bytes())


def _fields(**changes: Any) -> dict[str, Any]:
    entry = {"name": "a.txt", "size": 1, "sha256": "0" * 64}
    fields = {"format": "isthmus-bundle/1", "kind": "ends", "model_digest": "0" * 64, "cut": "1:1", "about": {}}
    return fields | {"files": [entry | change for change in changes.pop("entries", [{}])]} | changes


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def test_a_written_bundle_verifies_and_reads_back(folder: Path) -> None:
    manifest = bundle.verify(folder, PUBLISHER)
    assert manifest.about == ABOUT
    assert [type(value) for value in manifest.about.values()].count(bool) == 1
    assert manifest.id == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert Manifest.parse(manifest.to_bytes()) == manifest
    assert manifest.total_bytes == sum(map(len, FILES.values()))


def test_the_same_files_always_get_the_same_id(folder: Path) -> None:
    assert bundle.write(folder, "ends", "0" * 64, "2:2", dict(reversed(ABOUT.items())), KEY) == bundle.verify(
        folder, PUBLISHER
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "z.model", "manifest.json", "manifest.sig"])
def test_one_flipped_bit_anywhere_is_refused(folder: Path, name: str) -> None:
    _flip(folder / name, len((folder / name).read_bytes()) // 2)
    with pytest.raises(BundleError):
        bundle.verify(folder, PUBLISHER)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json", "manifest.sig"])
def test_a_truncated_longer_or_missing_file_is_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for damaged in (content[:-1], content + b"x"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(BundleError):
            bundle.verify(folder, PUBLISHER)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=name):
        bundle.verify(folder, PUBLISHER)


def test_a_file_of_another_size_is_named_with_both_sizes(folder: Path) -> None:
    (folder / "z.model").write_bytes(b"las")
    with pytest.raises(BundleError, match=r"z\.model has 3 bytes, not 4"):
        bundle.verify(folder, PUBLISHER)


def test_another_publisher_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match="publisher"):
        bundle.verify(folder, Ed25519PrivateKey.generate().public_key())


def test_what_is_not_listed_or_not_a_regular_file_is_refused(folder: Path) -> None:
    (folder / "extra.txt").touch()
    with pytest.raises(BundleError, match=r"extra\.txt"):
        bundle.verify(folder, PUBLISHER)
    (folder / "extra.txt").unlink()
    (folder / "sub").mkdir()
    with pytest.raises(BundleError, match="sub"):
        bundle.verify(folder, PUBLISHER)
    with pytest.raises(BundleError, match="sub is not a regular file"):
        bundle.write(folder, "ends", "0" * 64, "2:2", {}, KEY)
    (folder / "sub").rmdir()
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")
    with pytest.raises(BundleError, match=r"config\.json"):
        bundle.verify(folder, PUBLISHER)


@pytest.mark.parametrize("name", ["run.py", "weights.bin", ".hidden.json"])
def test_files_that_no_bundle_may_hold_are_not_packed(folder: Path, name: str) -> None:
    (folder / name).touch()
    with pytest.raises(BundleError, match=name):
        bundle.write(folder, "ends", "0" * 64, "2:2", {}, KEY)


@pytest.mark.parametrize(
    "name",
    ["../a.txt", "/etc/a.txt", "a/b.txt", "..", ".a.txt", "a.pkl", "a", "manifest.json", "a.txt\n", "a\0.txt", "é.txt"],
)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(BundleError):
        Manifest.parse(_canonical(_fields(entries=[{"name": name}])))


@pytest.mark.parametrize(
    "fields",
    [
        _fields(extra=1),
        _fields(format="isthmus-bundle/2"),
        _fields(kind="other"),
        _fields(model_digest="0"),
        _fields(cut="2"),
        _fields(about={"a": [1]}),
        _fields(about={"a": float("nan")}),
        _fields(entries=[{"size": -1}]),
        _fields(entries=[{"size": 1.0}]),
        _fields(entries=[{"size": True}]),
        _fields(entries=[{"size": "1"}]),
        _fields(entries=[{"sha256": "0" * 63}]),
        _fields(entries=[{"more": 1}]),
        _fields(entries=[{}, {}]),
        _fields(entries=[{}, {"name": "A.txt"}]),
        _fields(entries=[{"name": f"{i}.txt"} for i in range(4097)]),
        _fields(about={"a": "x" * (1 << 20)}),
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_manifest_that_is_not_exactly_the_format_is_refused(fields: dict[str, Any]) -> None:
    assert Manifest.parse(_canonical(_fields())).files[0].name == "a.txt"
    with pytest.raises(BundleError):
        Manifest.parse(_canonical(fields))


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_bytes_that_are_no_manifest_are_refused(content: bytes) -> None:
    with pytest.raises(BundleError):
        Manifest.parse(content)


def test_only_canonical_bytes_are_a_manifest() -> None:
    canonical = _canonical(_fields())
    for content in (canonical + b"\n", canonical.replace(b",", b", "), canonical.replace(b"{", b'{"cut":"1:1",', 1)):
        with pytest.raises(BundleError, match="canonical"):
            Manifest.parse(content)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 1 << 20, (1 << 20) + 7, 2_560_002, 2_560_006])
def test_reading_starts_at_any_offset(folder: Path, offset: int) -> None:
    whole = b"".join(FILES.values())
    manifest = bundle.verify(folder, PUBLISHER)
    at = offset
    for position, data in bundle.read(folder, manifest, offset):
        assert position == at
        assert whole[at : at + len(data)] == data
        assert len(data) <= 1 << 20
        at += len(data)
    assert at == len(whole)


@pytest.mark.parametrize("offset", [-1, 2_560_007])
def test_reading_outside_is_refused_at_once(folder: Path, offset: int) -> None:
    with pytest.raises(BundleError, match="outside"):
        bundle.read(folder, bundle.verify(folder, PUBLISHER), offset)


def test_an_interrupted_fetch_takes_only_the_missing_bytes(folder: Path, tmp_path: Path) -> None:
    manifest, cache = bundle.verify(folder, PUBLISHER), tmp_path / "cache"
    received = 0
    for stop_after in (1, 1, 99):
        receiver = Receiver(cache, manifest.id, PUBLISHER)
        assert receiver.offset == received
        _announce(receiver, folder)
        for _, (offset, data) in zip(range(stop_after), bundle.read(folder, manifest, receiver.offset), strict=False):
            receiver.add(offset, data)
            received += len(data)
        assert cached(cache, manifest.id) is None or stop_after == 99
    assert received == manifest.total_bytes
    done = receiver.finish()
    assert done == cached(cache, manifest.id)
    assert bundle.verify(done, PUBLISHER) == manifest
    assert [path.name for path in cache.iterdir()] == [manifest.id]


def test_nothing_is_written_for_a_wrong_id_signature_or_a_full_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, cache = bundle.verify(folder, PUBLISHER), tmp_path / "cache"
    content, signature = manifest.to_bytes(), (folder / "manifest.sig").read_bytes()
    with pytest.raises(BundleError, match="manifest"):
        Receiver(cache, "f" * 64, PUBLISHER).begin(content, signature)
    for wrong in (bytes(64), b"", signature + b"x"):
        with pytest.raises(BundleError, match="signature"):
            Receiver(cache, manifest.id, PUBLISHER).begin(content, wrong)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(BundleError, match="make room"):
        Receiver(cache, manifest.id, PUBLISHER).begin(content, signature)
    assert not cache.exists()


@pytest.mark.parametrize("bundle_id", ["../evil", "", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_an_id_that_is_no_hash_is_refused(tmp_path: Path, bundle_id: str) -> None:
    with pytest.raises(BundleError):
        Receiver(tmp_path, bundle_id, None)
    with pytest.raises(BundleError):
        cached(tmp_path, bundle_id)


def test_gaps_overlaps_and_excess_are_refused(folder: Path, tmp_path: Path) -> None:
    manifest = bundle.verify(folder, PUBLISHER)
    receiver = Receiver(tmp_path / "cache", manifest.id, PUBLISHER)
    with pytest.raises(BundleError, match="no manifest"):
        receiver.add(0, b"x")
    _announce(receiver, folder)
    receiver.add(0, b"{}")
    for offset, data in ((0, b"{}"), (1, b"x"), (3, b"x"), (2, bytes(manifest.total_bytes))):
        with pytest.raises(BundleError, match="do not continue"):
            receiver.add(offset, data)
    with pytest.raises(BundleError, match="missing"):
        receiver.finish()
    assert Receiver(tmp_path / "cache", manifest.id, PUBLISHER).offset == 2


def test_a_lying_sender_is_found_out_and_the_next_fetch_starts_clean(folder: Path, tmp_path: Path) -> None:
    manifest, cache = bundle.verify(folder, PUBLISHER), tmp_path / "cache"
    receiver = Receiver(cache, manifest.id, PUBLISHER)
    _announce(receiver, folder)
    receiver.add(0, bytes(manifest.total_bytes))
    with pytest.raises(BundleError, match="hash"):
        receiver.finish()
    assert list(cache.iterdir()) == []
    assert Receiver(cache, manifest.id, PUBLISHER).offset == 0


def test_two_receivers_of_one_bundle_both_get_it(folder: Path, tmp_path: Path) -> None:
    manifest, cache = bundle.verify(folder, PUBLISHER), tmp_path / "cache"
    first, second = (Receiver(cache, manifest.id, PUBLISHER) for _ in range(2))
    _announce(first, folder)
    _announce(second, folder)
    chunks = list(bundle.read(folder, manifest, 0))
    second.add(*chunks[0])
    for chunk in chunks:
        first.add(*chunk)
    done = first.finish()
    for chunk in chunks[1:]:
        second.add(*chunk)
    assert second.finish() == done
    assert bundle.verify(done, PUBLISHER) == manifest
    assert [path.name for path in cache.iterdir()] == [manifest.id]


def test_a_receiver_whose_folder_is_renamed_away_while_it_makes_room_makes_it_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, cache = bundle.verify(folder, PUBLISHER), tmp_path / "cache"
    renamed: list[Path] = []
    write = receiving.write_whole

    def write_after(path: Path, content: bytes) -> None:
        if not renamed:  # as another receiver does that has finished
            renamed.append(path.parent.rename(tmp_path / "elsewhere"))
        write(path, content)

    monkeypatch.setattr(receiving, "write_whole", write_after)
    receiver = Receiver(cache, manifest.id, PUBLISHER)
    _announce(receiver, folder)
    assert renamed
    for chunk in bundle.read(folder, manifest, 0):
        receiver.add(*chunk)
    assert bundle.verify(receiver.finish(), PUBLISHER) == manifest


def test_a_damaged_bundle_in_the_cache_is_not_used_and_is_replaced(folder: Path, tmp_path: Path) -> None:
    manifest, cache = bundle.verify(folder, PUBLISHER), tmp_path / "cache"
    damaged = Path(shutil.copytree(folder, cache / manifest.id))
    assert cached(cache, manifest.id) == damaged
    _flip(damaged / "model.safetensors")
    assert cached(cache, manifest.id) is None
    receiver = Receiver(cache, manifest.id, PUBLISHER)
    _announce(receiver, folder)
    for chunk in bundle.read(folder, manifest, 0):
        receiver.add(*chunk)
    assert receiver.finish() == cached(cache, manifest.id)


def test_nothing_is_written_through_a_planted_link(folder: Path, tmp_path: Path) -> None:
    manifest, cache, target = bundle.verify(folder, PUBLISHER), tmp_path / "cache", tmp_path / "target.json"
    target.write_bytes(b"")
    part = cache / f"{manifest.id}.part"
    part.mkdir(parents=True)
    (part / "config.json").symlink_to(target)
    with pytest.raises(BundleError):
        _announce(Receiver(cache, manifest.id, PUBLISHER), folder)
    assert target.read_bytes() == b""
