"""A cluster that a node starts is closed to others: to speak to one is to run code on it."""

import re
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from tests.harness import ENVIRONMENT, Server
from tests.on_ray.processes import below

JOIN = "import ray; ray.init(address={address!r}, logging_level='error'); print('JOINED', ray.nodes())"


def flag(server: Server, name: str) -> str:
    """What one of the node's Ray processes was started with."""
    found = [
        match[1] for command in below(server.process.pid).values() if (match := re.search(rf"{name}=(\S+)", command))
    ]
    assert found, f"no process was started with {name}"
    return found[0]


def test_a_process_without_the_token_cannot_join(servers: dict[str, Server]) -> None:
    address = flag(servers["llama"], "--gcs-address")
    strange = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("RAY_")}
    for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        command = [sys.executable, "-c", JOIN.format(address=address)]
        done = subprocess.run(command, env=strange | token, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert "JOINED" not in done.stdout


def test_the_agent_that_takes_jobs_refuses_whoever_has_no_token(servers: dict[str, Server]) -> None:
    host = flag(servers["llama"], "--gcs-address").rpartition(":")[0]
    port = flag(servers["llama"], "--listen-port")
    for path in ("/api/job_agent/jobs/", "/api/local_raylet_healthz"):
        with pytest.raises((urllib.error.URLError, ConnectionError)) as refused:
            urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10)
        if isinstance(refused.value, urllib.error.HTTPError):
            assert refused.value.code in (401, 403, 404, 405)


def test_no_dashboard_runs(servers: dict[str, Server]) -> None:
    assert not [
        command for command in below(servers["llama"].process.pid).values() if "dashboard/dashboard.py" in command
    ]
