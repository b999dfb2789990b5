"""Fixtures: the edge's install, made once, and the deep model with a server of it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devices import deep_model, edge_install
from tests.harness import Server, serving


@pytest.fixture(scope="session")
def edge_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with nothing but the edge's install."""
    return edge_install.make(tmp_path_factory.mktemp("edge") / "install")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The deep model's directory; it is large, so it does not stay."""
    directory = tmp_path_factory.mktemp("deep") / "model"
    deep_model.save(directory)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def deep_server(deep: Path, cache: Path) -> Iterator[Server]:
    """A server of the deep model that leaves one block at each end to the edge."""
    with serving(deep, "--cut", "1:1", cache=cache) as server:
        yield server
