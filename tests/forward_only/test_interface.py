"""The second epoch sends nothing, by the count of the network interface itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ENVIRONMENT

KEEP_ALIVE_BYTES = 4096
OWN_NETWORK = (("unshare", "--net"), ("unshare", "--user", "--map-root-user", "--net"))


@pytest.fixture(scope="module")
def own_network() -> tuple[str, ...]:
    """The command that runs another in a network namespace of its own."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("unshare and ip, of util-linux and iproute2, are not installed")
    for prefix in OWN_NETWORK:
        if subprocess.run([*prefix, "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0:
            return prefix
    pytest.skip("this kernel permits no network namespace to this user")


@pytest.fixture(scope="module")
def seen(
    own_network: tuple[str, ...], tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the program saw."""
    place = tmp_path_factory.mktemp("own-network")
    program = [sys.executable, "-m", "tests.forward_only.in_namespace", str(tiny_models["llama"]), str(place)]
    done = subprocess.run([*own_network, *program], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("way", ["top", "side"])
def test_the_first_epoch_moves_its_tensors_and_later_ones_only_keep_the_line_alive(
    seen: dict[str, Any], way: str
) -> None:
    first, *later = seen["epochs"][way]
    assert first > seen["tensor_bytes"]
    assert len(later) == 2
    assert max(later) < KEEP_ALIVE_BYTES < first / 100
