"""A forker, a server that nobody kills, and the runs that every disturbed one must equal."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.config import TrainConfig
from tests.faults.training import run_here
from tests.kills.disturbed import Place
from tests.kills.forked import Forked, Forker, forker
from tests.offsite.by_hand import make_emulator


@pytest.fixture(scope="session")
def forking() -> Iterator[Forker]:
    with forker() as found:
        yield found


@pytest.fixture(scope="session")
def place(
    forking: Forker, tiny_models: dict[str, Path], rows: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    """Everything that a run needs, but a server."""
    emulator = tmp_path_factory.mktemp("kills") / "emulator"
    make_emulator(emulator, tiny_models["llama"], "1:1", Ed25519PrivateKey.generate())
    return Place(forking, tiny_models["llama"], emulator, rows, cache, tmp_path_factory.mktemp("nodes"))


@pytest.fixture(scope="session")
def steady(place: Place) -> Forked:
    """A server that no test kills."""
    return place.serve()


@pytest.fixture(scope="session")
def undisturbed(place: Place, steady: Forked, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a run of a method that nothing happens to; made once for each."""
    made: dict[str, Path] = {}

    def run(method: str, **changes: object) -> Path:
        key = f"{method} {sorted(changes.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("undisturbed") / "run"
            config: TrainConfig = place.settings(method, steady.address, made[key].parent, **changes)
            run_here(config, made[key])
        return made[key]

    return run
