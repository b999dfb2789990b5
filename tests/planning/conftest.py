"""Runs that several tests hold plans against."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.conftest import CUTS
from tests.harness import serving
from tests.offsite.by_hand import make_emulator
from tests.planning.runs import Runs


@pytest.fixture(scope="session")
def runs(tiny_models: dict[str, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Makes runs over two servers, one of which offers an emulator."""
    place = tmp_path_factory.mktemp("planned")
    make_emulator(place / "emulators" / "half", tiny_models["llama"], "1:1", Ed25519PrivateKey.generate())
    cuts = [flag for cut in CUTS for flag in ("--cut", cut)]
    offering = ("--emulators", str(place / "emulators"))
    with (
        serving(tiny_models["llama"], *cuts, *offering, cache=cache) as llama,
        serving(tiny_models["gpt2"], *cuts, cache=cache) as gpt2,
    ):
        yield Runs(tiny_models, {"llama": llama.address, "gpt2": gpt2.address}, place)
