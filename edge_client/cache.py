"""What the span answered, kept on disk: one safetensors file a row, named by what decides the answer.

Knows tensors as they crossed the wire, files and their ages; knows no model, no batch and no session. Nothing read back
is trusted before it is checked, so nothing is synced: a torn entry is noticed, removed and fetched again.

A row's file stands at `origin/xx/key.safetensors`, where `origin` digests the `Origin` and `xx` begins the key. It
holds the payloads as bytes under "0", "1", ..., and as metadata the format, origin, key and the payloads' wire headers.
Where entries are sealed, their names are made of the key by the seal, and end otherwise: a key digests a row's tokens,
and whoever guesses a row could find its file.
"""

import errno
import hashlib
import heapq
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from google.protobuf.message import DecodeError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from isthmus.durable import DRAFT
from isthmus.errors import BundleError, RunError
from isthmus.faults import Fault, passing, write_passing
from isthmus.tensors_in_memory import metadata_of
from isthmus.trust.sealing import ENDING, Seal
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import Encoded, unpack

FORMAT = "isthmus-outputs/1"
DRAFT_AGE_S = 3600
"""A draft older than this is a crash's."""

# Nothing else is counted or removed: the directory may hold what is not ours.
_LAYOUT = ("[0-9a-f]{16}", "[0-9a-f]{2}", rf"[0-9a-f]{{64}}\.safetensors(\{ENDING})?(\.[0-9a-f]+\{DRAFT})?")
_WIDEST = 8
"""Decoded bytes that a payload byte may stand for: int8 as float64."""


@dataclass(frozen=True)
class Origin:
    """Everything but the row that decides what the cloud answers.

    The runtimes, of both sides, are what bits depend on: empty where a run does not promise the same ones.
    """

    model_digest: str
    cut: str
    codec: str
    codec_port: str
    edge_dtype: str
    span_dtype: str
    ports: tuple[str, ...]
    deterministic: bool
    edge_runtime: str
    span_runtime: str


def row_key(ids: Sequence[int], start: int, wanted: Sequence[bool] | None, placed: bool) -> str:
    """SHA-256 in hex of a row: its token ids, where it starts, whose outputs come back (None: all), and how it starts.

    `placed`: `start` is a position that was given; else it is a column.
    """
    flags = None if wanted is None else [int(bool(flag)) for flag in wanted]
    content = [[int(token) for token in ids], int(start), flags, int(placed)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class _File(NamedTuple):
    used_ns: int
    size: int
    path: str


class OutputCache:
    """Entries of one origin, in a directory that holds at most `limit_bytes` of entries of all origins together.

    The least recently used go first. Threads and processes may share the directory; each looks again at what the
    others added after every tenth of the limit that it puts, so each may exceed the limit by that much for a while.

    Raises:
        RunError: the directory cannot be made.
    """

    def __init__(self, directory: Path, limit_bytes: int, origin: Origin, seal: Seal | None = None) -> None:
        self._directory = directory
        self._seal = seal
        self._limit = limit_bytes
        self._origin = json.dumps(asdict(origin), sort_keys=True, separators=(",", ":"))
        self._entries = directory / hashlib.sha256(self._origin.encode()).hexdigest()[:16]
        self._lock = Lock()
        self._room = 0  # bytes that may be put before the directory must be looked at
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def get(self, key: str) -> list[torch.Tensor] | None:
        """The entry's CPU tensors, checked in every respect; None if there is none, or a damaged one, now removed."""
        path = self._path(key)
        try:
            tensors = self._read(path, key)
            with suppress(OSError):
                os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, DecodeError, KeyError, TypeError, ValueError):
            _remove(path)
            return None
        return tensors

    def put(self, key: str, tensors: Sequence[Encoded]) -> None:
        """Keep an entry as the most recently used; one larger than the limit is not kept.

        Raises:
            RunError: the disk is full even without half of the cache, or the directory cannot be written.
        """
        content = self._content(key, tensors)
        if len(content) > self._limit:
            return
        try:
            self._make_room(len(content))
            try:
                _write(self._path(key), content)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._halve()
                _write(self._path(key), content)
        except OSError as error:
            raise self._unwritable(error) from None

    def _path(self, key: str) -> Path:
        if self._seal is None:
            return self._entries / key[:2] / f"{key}.safetensors"
        name = self._seal.name(key)
        return self._entries / name[:2] / f"{name}.safetensors{ENDING}"

    def _about(self, key: str, headers: str) -> dict[str, str]:
        """An entry's metadata; the checksum is what notices damage to a header that leaves it plausible."""
        checksum = xxhash.xxh3_64_hexdigest(headers.encode())
        return {"format": FORMAT, "origin": self._origin, "key": key, "headers": headers, "checksum": checksum}

    def _content(self, key: str, tensors: Sequence[Encoded]) -> bytes:
        headers = " ".join(header.SerializeToString(deterministic=True).hex() for header, _ in tensors)
        payloads = {str(index): np.asarray(payload) for index, (_, payload) in enumerate(tensors)}
        content: bytes = save(payloads, metadata=self._about(key, headers))
        return content if self._seal is None else b"".join(self._seal.sealed(self._purpose(key), [content]))

    def _read(self, path: Path, key: str) -> list[torch.Tensor]:
        found = path.lstat()
        # Opening a named pipe would wait for its writer.
        if not stat.S_ISREG(found.st_mode) or found.st_size > self._limit:
            raise BundleError(f"{path} is no entry; fetch it again")
        content = path.read_bytes() if self._seal is None else self._seal.read(path, self._purpose(key))
        payloads, about = load(content), metadata_of(content)
        headers = about.get("headers", "")
        names = [str(index) for index in range(len(headers.split()))]
        whole = about == self._about(key, headers) and payloads.keys() == set(names)
        if not whole or any(payload.dtype != np.uint8 for payload in payloads.values()):
            raise BundleError(f"{path} is damaged or another's; fetch it again")
        return [_decoded(text, payloads[name]) for text, name in zip(headers.split(), names, strict=True)]

    def _purpose(self, key: str) -> str:
        return f"outputs/{self._entries.name}/{key}"

    def _make_room(self, size: int) -> None:
        with self._lock:
            if size > self._room:
                total = sum(file.size for file in self._scan())
                if total + size > self._limit:
                    total -= self._evict(total + size - self._limit * 9 // 10)
                self._room = min(self._limit - total, self._limit // 10)
            self._room -= size

    def _halve(self) -> None:
        with self._lock:
            self._evict(sum(file.size for file in self._scan()) // 2)
            self._room = 0

    def _evict(self, excess: int) -> int:
        """Remove the least recently used entries that make up `excess` bytes; the bytes removed.

        A heap of no more than those, its newest on top, so that a million entries need not be held to be sorted.
        """
        oldest: list[_File] = []
        freed = 0
        for file in self._scan():
            if not file.path.endswith(DRAFT):
                heapq.heappush(oldest, file._replace(used_ns=-file.used_ns))
                freed += file.size
            while oldest and freed - oldest[0].size >= excess:
                freed -= heapq.heappop(oldest).size
        for file in oldest:
            _remove(Path(file.path))
        return freed

    def _scan(self) -> Iterator[_File]:
        """Entries of every origin, and drafts; what a crash left behind is removed."""
        for entry in _files(str(self._directory), _LAYOUT):
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if entry.name.endswith(DRAFT) and time.time() - found.st_mtime > DRAFT_AGE_S:
                _remove(Path(entry.path))
            else:
                yield _File(found.st_mtime_ns, found.st_size, entry.path)

    def _unwritable(self, error: OSError) -> RunError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space, or give another --cache" if full else "give another --cache"
        return RunError(f"the cache {self._directory} cannot be written ({error.strerror}); {remedy}")


def _decoded(text: str, stored: Any) -> torch.Tensor:
    """The tensor of a header in hex and its payload, copied from the map before anything about it is checked."""
    payload = bytearray(memoryview(stored))
    return unpack(pb.Tensor.FromString(bytes.fromhex(text)), payload, _WIDEST * len(payload))


def _files(folder: str, layout: Sequence[str]) -> Iterator[os.DirEntry[str]]:
    """Whatever stands as deep under `folder` as the layout, by the layout's names."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        for entry in found:
            if re.fullmatch(layout[0], entry.name):
                if layout[1:]:
                    yield from _files(entry.path, layout[1:])
                else:
                    yield entry


def _write(path: Path, content: bytes) -> None:
    """Whole under its name or not at all while the power lasts; readable by its owner alone."""
    for folder in reversed(path.parents[:3]):
        folder.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}{DRAFT}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            write_passing(file, content, Fault.CACHE_HALF_WRITTEN)
        passing(Fault.CACHE_BEFORE_RENAME)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _remove(path: Path) -> None:
    """Remove a file, or a directory that stands in its place; others may have been faster."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
