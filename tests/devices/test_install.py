"""An edge needs what `isthmus[edge]` brings and nothing else: no server, no cluster, no model conversion."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.devices.edge_install import closure, importable_beyond

LOOK = """
import importlib, importlib.util, json, pkgutil, sys
import edge_client
found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
modules = [each.name for each in pkgutil.walk_packages(edge_client.__path__, "edge_client.")]
modules.remove("edge_client.__main__")
for name in modules:
    importlib.import_module(name)
print(json.dumps({"beyond": found, "imported": modules, "prefix": sys.prefix}))
"""


def test_every_module_of_the_edge_imports_where_only_its_install_is(edge_python: Path, tmp_path: Path) -> None:
    beyond = sorted(importable_beyond("edge"))
    assert {"cloud_node", "emulator", "gguf", "grpc_tools", "pytest"} <= set(beyond)
    done = subprocess.run([edge_python, "-c", LOOK, *beyond], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["beyond"] == []
    assert "edge_client.train" in said["imported"]
    assert Path(said["prefix"]) == edge_python.parents[1]


@pytest.mark.parametrize("name", ["ray", "prometheus-client", "grpcio-tools", "bitsandbytes", "trl", "gguf", "fastapi"])
def test_an_edge_installs_nothing_of_a_server_or_a_cluster(name: str) -> None:
    assert name not in closure("edge")
    assert "torch" in closure("edge")
