"""A cluster that a node starts is closed to others: to speak to one is to run code on it."""

import re
import subprocess
import sys
import urllib.error
import urllib.request

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
    job = urllib.request.Request(
        f"http://{host}:{flag(servers['llama'], '--listen-port')}/api/job_agent/jobs/",
        data=b'{"entrypoint": "id"}',
        headers={"Content-Type": "application/json"},
    )
    # The agent of a second cluster on a machine finds its port taken, and listens nowhere.
    assert {asked(job) for _ in range(5)} <= {401, 403, None}


def asked(request: urllib.request.Request) -> int | None:
    """The status of an answer; None where nobody listens."""
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 (an address of our own)
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_what_is_left_of_the_dashboard_has_no_page_and_no_jobs_and_is_on_loopback(servers: dict[str, Server]) -> None:
    commands = [
        command for command in below(servers["llama"].process.pid).values() if "dashboard/dashboard.py" in command
    ]
    for command in commands:
        assert "--disable-frontend" in command
        assert "--host=127.0.0.1" in command
        assert "JobHead" not in command
