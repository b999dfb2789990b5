"""Fixtures for the whole suite: one thread, no hub, tiny models and servers that many tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.harness import Server, save_tiny_model, serving, write_rows

torch.set_num_threads(1)

CUTS = ("1:1", "2:0", "0:2", "0:0")
FAMILIES = ("llama", "gpt2")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle cache of this suite's own."""
    place = tmp_path_factory.mktemp("cache")
    os.environ["ISTHMUS_CACHE"] = str(place)
    return place


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny model per family."""
    places = {family: tmp_path_factory.mktemp(family) / f"tiny-{family}" for family in FAMILIES}
    for family, place in places.items():
        save_tiny_model(place, family)
    return places


@pytest.fixture(scope="session")
def servers(tiny_models: dict[str, Path], cache: Path) -> Iterator[dict[str, Server]]:
    """A plaintext loopback server process per family that offers every cut; tests must not stop it."""
    flags = [flag for cut in CUTS for flag in ("--cut", cut)]
    with (
        serving(tiny_models["llama"], *flags, cache=cache) as llama,
        serving(tiny_models["gpt2"], *flags, cache=cache) as gpt2,
    ):
        yield {"llama": llama, "gpt2": gpt2}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file with choices and rows of differing lengths."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")
