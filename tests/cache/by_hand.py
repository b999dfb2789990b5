"""A cache by hand: tensors as they cross, the keys and origins they are kept under, and the files they are kept in."""

import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from edge_client.cache import Origin, OutputCache, row_key
from isthmus.wire.tensors import Encoded, pack, unpack

ORIGIN = Origin("ab" * 32, "2:2", "bf16", "int8", "float32", "bfloat16", ("3:64", "5:64"), True, "torch 1", "torch 2")
OTHERS = [
    replace(ORIGIN, model_digest="cd" * 32),
    replace(ORIGIN, cut="2:3"),
    replace(ORIGIN, codec="none"),
    replace(ORIGIN, codec_port="bf16"),
    replace(ORIGIN, edge_dtype="bfloat16"),
    replace(ORIGIN, span_dtype="float32"),
    replace(ORIGIN, ports=("3:64",)),
    replace(ORIGIN, ports=("5:64", "3:64")),
    replace(ORIGIN, deterministic=False),
    replace(ORIGIN, edge_runtime="torch 3"),
    replace(ORIGIN, span_runtime="torch 3"),
]
PLENTY = 1 << 30
KEY, OTHER_KEY = row_key([1, 2, 3], 0, None, False), row_key([1, 2, 4], 0, None, False)
KEYS = [row_key([number], 0, None, False) for number in range(100)]


def encoded(number: int = 0, codec: str = "none", shape: tuple[int, ...] = (3, 50)) -> Encoded:
    """A tensor that only `number` decides, as it crossed."""
    return pack(torch.randn(shape, generator=torch.Generator().manual_seed(number)), codec)


def decoded(sent: Encoded) -> torch.Tensor:
    """What a receiver makes of it without a cache."""
    return unpack(sent[0], bytearray(sent[1]), PLENTY)


def stands(cache: OutputCache, key: str) -> bool:
    """Whether there is a file for it, whole or not."""
    return cache._path(key).is_file()


def equal(got: list[torch.Tensor] | None, sent: list[Encoded]) -> bool:
    """Whether an entry holds exactly these, type and shape included."""
    wanted = [decoded(one) for one in sent]
    return got is not None and len(got) == len(wanted) and all(map(same, got, wanted))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def file_of(directory: Path, key: str = KEY) -> Path:
    """Where the one entry of this key stands."""
    (path,) = directory.glob(f"*/{key[:2]}/{key}.safetensors")
    return path


def used(path: Path, seconds_ago: float) -> None:
    os.utime(path, (time.time() - seconds_ago,) * 2)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
