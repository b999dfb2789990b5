"""Submissions that do not mean well: judged before anything is written, and nothing of them stays."""

import asyncio
import hashlib
import json
import os
import shlex
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from cloud_node import arriving, submissions
from cloud_node.cli import app
from cloud_node.submissions import KEPT, Submissions, folder_of
from isthmus import bundle
from isthmus.bundle import Manifest
from isthmus.cut import Cut
from isthmus.errors import BundleError, IsthmusError, LimitError, UnreachableError, WireError
from isthmus.receiver import Receiver
from isthmus.trust import signing
from isthmus.wire.gen import backbone_pb2 as pb
from tests.emulator.adapters import KEY as ADAPTER_KEY
from tests.emulator.adapters import submitted

DIGEST = "0" * 64
LIMIT = 5 << 20
EDGE = "spiffe://isthmus/edge/eve"
KEY = Ed25519PrivateKey.generate()
WEIGHTS = bytes(range(256)) * 8192


def packed(folder: Path, note: int = 0, weights: bytes = WEIGHTS) -> list[pb.BundleFrame]:
    """The frames of a good submission: a manifest, then chunks of 1 MiB."""
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(weights)
    manifest = bundle.write(folder, "adapter", DIGEST, "1:1", {"note": note}, KEY)
    data = [pb.BundleFrame(offset=offset, data=data) for offset, data in bundle.read(folder, manifest, 0)]
    return [pb.BundleFrame(manifest=manifest.to_bytes(), signature=bundle.read_signature(folder)), *data]


def announced(**changes: object) -> pb.BundleFrame:
    """A first frame whose manifest says anything at all."""
    entry = {"name": "adapter.safetensors", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    entries = changes.pop("files", [{}])
    fields = {"format": "isthmus-bundle/1", "kind": "adapter", "model_digest": DIGEST, "cut": "1:1", "about": {}}
    fields |= {"files": [entry | change for change in entries]} | changes  # type: ignore[attr-defined]
    content = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return pb.BundleFrame(manifest=content, signature=signing.sign(KEY, content))


async def sent(frames: Iterable[pb.BundleFrame], then: float = 0.0) -> AsyncIterator[pb.BundleFrame]:
    for frame in frames:
        yield frame
    await asyncio.sleep(then)


def accept(_: Path) -> None:
    """Nothing is wrong with it."""


def taking(place: Path, check: Callable[[Path], object] = accept) -> Submissions:
    return Submissions(place, DIGEST, {Cut(1, 1): LIMIT}, None, check, Path("model"))


def take(taker: Submissions, frames: Iterable[pb.BundleFrame], identity: str = EDGE) -> pb.SubmitReceipt:
    return asyncio.run(taker.take(identity, sent(frames)))


def test_what_is_checked_is_the_whole_adapter_and_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    frames, place = packed(tmp_path / "packed"), tmp_path / "taken"
    seen: list[bytes] = []

    def refuse(adapter: Path) -> None:
        seen.append((adapter / "adapter.safetensors").read_bytes())
        raise BundleError(f"{adapter / 'adapter.safetensors'} does not please")

    with pytest.raises(BundleError, match=r"^adapter\.safetensors does not please$"):
        take(taking(place, refuse), frames)
    assert seen == [WEIGHTS]
    assert list(place.iterdir()) == []
    assert not take(taking(place), frames).already


def test_the_command_that_is_logged_runs_as_it_stands(
    tiny_models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, key = submitted(tiny_models["llama"], tmp_path / "adapter"), tmp_path / "sig ners" / "eve.pub"
    key.parent.mkdir()
    key.write_bytes(ADAPTER_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    manifest = bundle.verify(adapter, None)
    data = [pb.BundleFrame(offset=offset, data=data) for offset, data in bundle.read(adapter, manifest, 0)]
    first = pb.BundleFrame(manifest=manifest.to_bytes(), signature=bundle.read_signature(adapter))
    monkeypatch.chdir(tmp_path)
    limits = {Cut(1, 1): LIMIT}
    taker = Submissions(
        Path("taken"), manifest.model_digest, limits, Path("sig ners"), accept, model=tiny_models["llama"]
    )
    with caplog.at_level("INFO"):
        take(taker, [first, *data])
    name, *said = shlex.split(caplog.messages[-1].partition("; next: ")[2])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    done = CliRunner().invoke(app, said)
    assert (name, done.exception) == ("cloud_node", None), done.output
    made, record = sorted((elsewhere / "plugged-in").iterdir())
    assert record.name == f"{made.name}.costs.jsonl"
    assert (made / "config.json").is_file()
    assert "nobody vouches" not in done.output


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (announced(files=[{"name": "../adapter.safetensors"}]), "malformed"),
        (announced(files=[{"name": "/etc/adapter.safetensors"}]), "malformed"),
        (announced(files=[{"name": "a/adapter.safetensors"}]), "malformed"),
        (announced(files=[{"name": "manifest.json"}]), "malformed"),
        (announced(files=[{"name": "adapter.pkl"}]), "malformed"),
        (announced(files=[{}, {"name": "other.safetensors"}]), "not those of an adapter"),
        (announced(files=[{"name": "adapter_model.safetensors"}]), "not those of an adapter"),
        (announced(files=[]), "not those of an adapter"),
        (announced(files=[{"size": LIMIT + 1}]), f"takes {LIMIT} at cut 1:1"),
        (announced(files=[{"size": 1 << 52}]), "train fewer weights"),
        (announced(kind="ends"), "of kind adapter, not ends"),
        (announced(kind="emulator"), "of kind adapter, not emulator"),
        (announced(model_digest="f" * 64), "of another model"),
        (announced(cut="0:1"), "for cut 0:1, and this node gives out 1:1"),
        (announced(cut="99999:99999"), "for cut 99999:99999"),
        (pb.BundleFrame(offset=0, data=b"x"), "begins with its manifest"),
        (pb.BundleFrame(manifest=announced().manifest), "begins with its manifest and signature"),
        (pb.BundleFrame(manifest=b"{", signature=bytes(64)), "malformed"),
        (pb.BundleFrame(manifest=b" " * ((1 << 20) + 1), signature=bytes(64)), "over 1048576 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_announcement_is_refused_before_anything_is_written(
    first: pb.BundleFrame, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*_: object) -> None:
        raise AssertionError("something was written")

    taker = taking(tmp_path / "taken")
    monkeypatch.setattr(submissions, "Receiver", written)
    with pytest.raises(IsthmusError, match=reason):
        take(taker, [first])
    assert list((tmp_path / "taken").iterdir()) == []


def spoilt(how: str, frames: list[pb.BundleFrame]) -> list[pb.BundleFrame]:
    first, *data = frames
    match how:
        case "short":
            return [first, *data[:-1]]
        case "gap":
            return [first, *data[1:]]
        case "twice":
            return [first, data[0], *data]
        case "empty":
            return [first, pb.BundleFrame(offset=0)]
        case "manifest again":
            return [first, pb.BundleFrame(manifest=first.manifest, offset=0, data=data[0].data), *data[1:]]
        case "too much":
            return [first, pb.BundleFrame(offset=0, data=bytes(len(WEIGHTS) + 1))]
        case _:
            return [first, pb.BundleFrame(offset=0, data=bytes(len(WEIGHTS)))]


@pytest.mark.parametrize(
    ("how", "error", "reason"),
    [
        ("short", WireError, "ended before all of it"),
        ("gap", WireError, "does not go on at byte 0"),
        ("twice", WireError, "does not go on at byte 1048576"),
        ("empty", WireError, "does not go on at byte 0"),
        ("manifest again", WireError, "does not go on at byte 0"),
        ("too much", BundleError, "do not continue"),
        ("lie", BundleError, "not what the submission's hashes say"),
    ],
)
def test_of_a_broken_stream_nothing_stays(how: str, error: type[IsthmusError], reason: str, tmp_path: Path) -> None:
    frames, place = packed(tmp_path / "packed"), tmp_path / "taken"
    taker = taking(place)
    with pytest.raises(error, match=reason) as caught:
        take(taker, spoilt(how, frames))
    assert str(tmp_path) not in str(caught.value)
    assert list(place.iterdir()) == []
    assert not take(taker, frames).already


def test_a_silent_submission_is_given_up_and_the_next_of_its_identity_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arriving, "STALL_S", 0.2)
    frames, place = packed(tmp_path / "packed"), tmp_path / "taken"
    taker = taking(place)

    async def both() -> list[pb.SubmitReceipt | BaseException]:
        stalled, good = taker.take(EDGE, sent(frames[:2], then=30)), taker.take(EDGE, sent(frames))
        return await asyncio.gather(stalled, good, return_exceptions=True)

    stalled, good = asyncio.run(both())
    assert isinstance(stalled, UnreachableError)
    assert isinstance(good, pb.SubmitReceipt)
    assert [path.name for path in (place / folder_of(EDGE)).iterdir()] == [good.bundle]


def test_a_byte_now_and_then_is_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "STALL_S", 0.4)
    first, chunk, _ = packed(tmp_path / "packed")

    async def dripping() -> AsyncIterator[pb.BundleFrame]:
        yield first
        for at in range(60):
            yield pb.BundleFrame(offset=at, data=chunk.data[at : at + 1])
            await asyncio.sleep(0.05)

    taker, began = taking(tmp_path / "taken"), time.monotonic()
    with pytest.raises(UnreachableError, match=r"made no progress for 0\.4 s"):
        asyncio.run(taker.take(EDGE, dripping()))
    assert time.monotonic() - began < 2
    assert list((tmp_path / "taken").iterdir()) == []


def test_a_slow_line_that_keeps_bringing_chunks_is_borne(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "STALL_S", 0.6)
    frames, began = packed(tmp_path / "packed"), time.monotonic()

    async def slowly() -> AsyncIterator[pb.BundleFrame]:
        for frame in frames:
            await asyncio.sleep(0.3)
            yield frame

    assert not asyncio.run(taking(tmp_path / "taken").take(EDGE, slowly())).already
    assert time.monotonic() - began > 0.6


def test_who_announces_nothing_keeps_no_other_of_its_identity_waiting(tmp_path: Path) -> None:
    taker, frames = taking(tmp_path / "taken"), packed(tmp_path / "packed")

    async def beside_silence() -> pb.SubmitReceipt:
        silent = [asyncio.create_task(taker.take(EDGE, sent([], then=30))) for _ in range(3)]
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(10):
                return await taker.take(EDGE, sent(frames))
        finally:
            for task in silent:
                task.cancel()

    assert not asyncio.run(beside_silence()).already


def test_no_other_call_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, real, seen = packed(tmp_path / "packed"), os.fsync, []

    def fsync(descriptor: int) -> None:
        seen.append(threading.current_thread() is threading.main_thread())
        real(descriptor)

    taker = taking(tmp_path / "taken")
    monkeypatch.setattr(os, "fsync", fsync)
    take(taker, frames)
    assert len(seen) > 4
    assert not any(seen)


def test_what_is_written_when_a_call_is_cancelled_is_written_before_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, place, real, writing = packed(tmp_path / "packed"), tmp_path / "taken", Receiver.begin, threading.Event()

    def begin(self: Receiver, manifest: bytes, signature: bytes) -> Manifest:
        writing.set()
        time.sleep(0.3)
        return real(self, manifest, signature)

    monkeypatch.setattr(Receiver, "begin", begin)

    async def cancelled() -> None:
        task = asyncio.create_task(taking(place).take(EDGE, sent(frames)))
        await asyncio.to_thread(writing.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert list(place.iterdir()) == []


def test_checks_of_two_identities_run_side_by_side_and_those_of_one_in_turn(tmp_path: Path) -> None:
    both_here, under_way, most = threading.Barrier(2, timeout=10), [0], [0]

    def meet(_: Path) -> None:
        both_here.wait()

    def count(_: Path) -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.1)
        under_way[0] -= 1

    async def two(taker: Submissions, *identities: str) -> None:
        folders = [tmp_path / f"{identities[1][-1]}-{number}" for number in range(2)]
        packs = [packed(folder, number) for number, folder in enumerate(folders)]
        await asyncio.gather(*(taker.take(who, sent(frames)) for who, frames in zip(identities, packs, strict=True)))

    asyncio.run(two(taking(tmp_path / "meeting", meet), EDGE, f"{EDGE}2"))
    asyncio.run(two(taking(tmp_path / "counting", count), EDGE, EDGE))
    assert most == [1]


def test_a_submission_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    frames, place = packed(tmp_path / "packed"), tmp_path / "taken"

    async def cancelled() -> None:
        task = asyncio.create_task(taking(place).take(EDGE, sent(frames[:2], then=30)))
        while not list(place.rglob("adapter.safetensors")):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert list(place.iterdir()) == []


def test_what_a_killed_node_was_receiving_is_removed_and_what_it_kept_stays(tmp_path: Path) -> None:
    frames, place = packed(tmp_path / "packed"), tmp_path / "taken"
    receipt = take(taking(place), frames)
    home = place / folder_of(EDGE)
    (home / ".arriving-0a0b" / "x.part").mkdir(parents=True)
    assert take(taking(place), frames).already
    assert [path.name for path in home.iterdir()] == [receipt.bundle]


def test_each_identity_may_keep_so_many_and_repeats_are_still_answered(tmp_path: Path) -> None:
    taker = taking(tmp_path / "taken")
    for number in range(KEPT):
        frames = packed(tmp_path / f"packed-{number}", number, b"x")
        take(taker, frames)
    assert take(taker, frames).already
    more = packed(tmp_path / "more", KEPT, b"x")
    with pytest.raises(LimitError, match=f"keeps {KEPT} submissions of yours"):
        take(taker, more)
    assert not take(taker, more, "spiffe://isthmus/edge/other").already


@pytest.mark.parametrize(
    "identity", ["spiffe://isthmus/edge/..", "cn:../../etc", "cn:/", "anonymous", "cn:" + "x" * 500, "cn:.a\n\0b", ""]
)
def test_an_identitys_folder_is_a_plain_name_of_its_own(identity: str) -> None:
    name = folder_of(identity)
    assert Path(name).name == name
    assert not name.startswith(".")
    assert name.isascii()
    assert name.isprintable()
    assert len(name) < 100
    assert len({name, folder_of(identity + "x"), folder_of(identity.replace(".", "-") + "-")}) == 3
