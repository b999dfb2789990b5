"""Servers whose engine is Ray, under the names by which the other suites ask for theirs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CUTS, FAMILIES
from tests.forward_only.conftest import OFFERED
from tests.harness import Server, serving

ENGINES = {"two-replicas": ("--stages", "1", "--replicas", "2:2"), "three-stages": ("--stages", "3")}


AGAIN = {
    "family": ("llama", "gpt2"),
    "cut": ("1:1", "0:2"),
    "microbatches": (4,),
    "codec": ("int8",),
    "padding": ("left",),
}
"""Of the suites that are run here again, what their tests are run with."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is proved elsewhere already, and does not depend on where a span runs."""
    here = Path(__file__).parent
    for item in [item for item in items if item.path.parent == here]:
        given = getattr(item, "callspec", None)
        if given is not None and any(given.params[name] not in AGAIN[name] for name in AGAIN.keys() & given.params):
            items.remove(item)


@pytest.fixture(scope="package", params=ENGINES.values(), ids=ENGINES)
def servers(request: pytest.FixtureRequest, tiny_models: dict[str, Path], cache: Path) -> Iterator[dict[str, Server]]:
    """A node of each family with its spans on Ray; tests must not stop it."""
    flags = [flag for cut in dict.fromkeys((*CUTS, *OFFERED)) for flag in ("--cut", cut)]
    flags += ["--engine", "ray", *request.param]
    with (
        serving(tiny_models["llama"], *flags, cache=cache) as llama,
        serving(tiny_models["gpt2"], *flags, cache=cache) as gpt2,
    ):
        nodes = {"llama": llama, "gpt2": gpt2}
        yield nodes
        for family in FAMILIES:
            assert nodes[family].process.poll() is None, nodes[family].log
            assert "Traceback" not in nodes[family].log, nodes[family].log


@pytest.fixture(scope="package")
def spans(servers: dict[str, Server]) -> dict[str, Server]:
    """As the DLoRA suite calls them."""
    return servers


@pytest.fixture(scope="package")
def homes(tiny_models: dict[str, Path]) -> dict[str, Path]:
    """As the DLoRA suite calls them."""
    return tiny_models


@pytest.fixture(scope="package")
def nodes(servers: dict[str, Server]) -> dict[str, Server]:
    """As the forward-only suite calls them."""
    return servers
