"""Inputs for whoever reads a file or a description: damaged ones are refused in words, or read as they stand.

Knows good files of every kind, each made as the product makes it, and what reads it. Nothing else may come of damage
than an error of the catalogue, or whatever the reader answers for "there is none".
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st

from edge_client.cache import OutputCache, row_key
from edge_client.config import TrainConfig
from emulator.lora_settings import LoraSettings
from emulator.merge_settings import MergeSettings
from emulator.outline import Outline
from emulator.tuned_ends import check
from isthmus import bundle
from isthmus.bundle import Manifest
from isthmus.emulated.recipe import Emulator
from isthmus.errors import IsthmusError
from isthmus.planning import calibration
from isthmus.receiver import Receiver
from isthmus.report.history import History
from isthmus.report.schema import RunReport
from isthmus.settings import read_settings
from isthmus.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from isthmus.trust.credentials import Credentials
from isthmus.wire.tensors import pack
from tests.cache.test_disk import ORIGIN
from tests.fuzz.inputs import damage, damaged
from tests.fuzz.target import Target, said
from tests.planning.test_calibration import calibration as calibrated

Read: TypeAlias = Callable[[Path], object]


class Place:
    """A good file in its folder, and what reads it."""

    def __init__(self, folder: Path, name: str, read: Read, target: str | None = None) -> None:
        self.name = target or name
        self._folder, self._file, self._read = folder, folder / name, read
        self._good = self._file.read_bytes()
        self._others = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != self._file}
        read(folder)  # the good one is read

    def feed(self, content: bytes) -> None:
        """Read it with this content; the folder is as before afterwards."""
        self._file.write_bytes(content)
        try:
            self._read(self._folder)
        except IsthmusError as error:
            said(error)
        finally:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_bytes(self._good)
            for path, before in self._others.items():
                if not path.is_file() or path.stat().st_size != len(before):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(before)

    def target(self) -> Target:
        """Its target: damage to the good bytes, and for text also to what it says."""
        harmed = damage().map(lambda changes: b"".join(damaged([self._good], changes)))
        inputs = [harmed, st.binary(max_size=300)]
        with suppress(ValueError):
            said = json.loads(self._good)
            if isinstance(said, dict):
                inputs.append(_said_otherwise(said))
        return Target(self.name, 1, st.one_of(inputs), self.feed)


_leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12))
_values = st.recursive(_leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))


def _said_otherwise(good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """The same JSON with one or two fields of other values, whatever their depth."""
    paths = list(_paths(good))
    one = st.tuples(st.sampled_from(paths), _values)
    return st.lists(one, min_size=1, max_size=2).map(lambda changes: _with(good, changes))


def _paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, below in items:
        yield (*path, key)
        yield from _paths(below, (*path, key))


def _with(good: dict[str, Any], changes: list[tuple[tuple[Any, ...], Any]]) -> bytes:
    changed: Any = json.loads(json.dumps(good))
    for path, value in changes:
        node = changed
        with suppress(KeyError, IndexError, TypeError):  # another change has put something else there
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
    return json.dumps(changed).encode()


def places(site: Path, model: Path, emulated: Path, run: Path, identity: Path) -> Iterator[Place]:
    """Every kind of file that the product reads, in folders under `site`.

    `emulated` is an emulator's folder, `run` a finished run's, `identity` an edge's certificates.
    """
    yield Place(_copied(run, site / "run"), "run.json", RunReport.load)
    yield Place(_copied(run, site / "history"), "metrics.jsonl", History.read)
    yield Place(site / "history", "ledger.jsonl", History.read)
    config = _copied(run, site / "config")
    yield Place(config, "config.yaml", lambda home: read_settings(TrainConfig, home / "config.yaml", {}))
    yield Place(_checkpoint(site / "checkpoints"), _only(site / "checkpoints"), load_checkpoint, "checkpoint")
    yield _cached(site / "cache")
    yield from _adapters(_copied(run / "adapter", site / "adapter"), model)
    yield Place(_copied(emulated, site / "emulator"), "emulator.json", Emulator.load)
    yield Place(_copied(emulated, site / "bundle"), "manifest.json", lambda home: bundle.verify(home, None))
    yield Place(_copied(emulated, site / "arriving"), "manifest.json", lambda home: _arrive(home, site / "received"))
    yield Place(_calibrated(site / "calibration"), "it.json", lambda home: calibration.read(home / "it.json"))
    for name in ("ca.pem", "cert.pem", "key.pem", "signing.key", "publisher.pub"):
        yield Place(_copied(identity, site / f"for-{name}"), name, _all_keys)


def _copied(source: Path, folder: Path) -> Path:
    if not folder.exists():
        folder.mkdir(parents=True, mode=0o700)
        for path in source.iterdir():
            if path.is_file():
                (folder / path.name).touch(mode=path.stat().st_mode)
                (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _only(folder: Path) -> str:
    (path,) = folder.iterdir()
    return path.name


def _checkpoint(folder: Path) -> Path:
    save_checkpoint(folder, Checkpoint(3, {"a": torch.ones(4, 3)}, {"seed": 1}))
    return folder


def _cached(folder: Path) -> Place:
    cache, key = OutputCache(folder, 1 << 30, ORIGIN), row_key([1, 2, 3], 0, None, False)
    cache.put(key, [pack(torch.ones(3, 8), "int8")])
    (path,) = folder.rglob("*.safetensors")
    return Place(folder, str(path.relative_to(folder)), lambda _: cache.get(key), "cache entry")


def _adapters(folder: Path, model: Path) -> Iterator[Place]:
    known = Outline.of(model, "0" * 64)
    yield Place(folder, "adapter_model.safetensors", lambda home: check(home, known, model=model), "adapter's weights")
    for read in (LoraSettings.load, MergeSettings.load):
        yield Place(folder, "adapter_config.json", read, f"adapter_config.json by {read.__self__.__name__}")


def _arrive(home: Path, cache: Path) -> None:
    """Receive a bundle whose sender says what its manifest now says."""
    content, signature = (home / "manifest.json").read_bytes(), (home / "manifest.sig").read_bytes()
    told = Manifest.parse(content)
    receiver = Receiver(cache, told.id, None)
    receiver.begin(content, signature)
    for offset, data in bundle.read(home, told, receiver.offset):
        receiver.add(offset, data)
    receiver.finish()


def _calibrated(folder: Path) -> Path:
    folder.mkdir()
    (folder / "it.json").write_text(calibrated().to_json())
    return folder


def _all_keys(home: Path) -> None:
    credentials = Credentials.load(home)
    credentials.signing_key()
    credentials.publisher()
