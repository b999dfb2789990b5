"""The front end of KubeRay runs: it joins a cluster as a node that gives nothing, and its stages are on the others."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.deploy.places import BIN, free_port, of_container
from tests.deploy.running import asked, lay_out, script, started
from tests.deploy.written import the, words_of
from tests.harness import ENVIRONMENT

pytest.importorskip("ray", reason="the extra `ray` is not installed")

POD = the("Deployment", "isthmus-front-end")["spec"]["template"]["spec"]
NODE = POD["containers"][0]
TOKEN = "0123456789abcdef" * 2


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of one node, which takes the stages, and the environment of whoever may join it."""
    place = tmp_path_factory.mktemp("ray")
    port = free_port()
    names = {"RAY_TMPDIR": str(place), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment = {**ENVIRONMENT, **names, "RAY_USAGE_STATS_ENABLED": "0"}
    start = [str(BIN / "ray"), "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    try:
        subprocess.run(start, env=environment, capture_output=True, timeout=120, check=True)
        yield {**names, "RAY_USAGE_STATS_ENABLED": "0", "HEAD": f"127.0.0.1:{port}"}
    finally:
        end_all_of(place)


def end_all_of(place: Path) -> None:
    """End every process whose `RAY_TMPDIR` is this folder: `ray stop` would end other clusters too."""
    mark = f"RAY_TMPDIR={place}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.timeout(300)
def test_the_front_end_joins_the_cluster_answers_its_probes_and_ends_in_time(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    site = lay_out(tmp_path)
    places = of_container(NODE, tmp_path)
    (tmp_path / "certs").rename(tmp_path / "issued")
    (tmp_path / "certs").symlink_to("issued/server")
    (tmp_path / "models").symlink_to(site / "models")
    told = script(words_of(NODE), places).replace("isthmus-head-svc:6379", cluster.pop("HEAD"))
    assert told.count("--device cuda") == 1
    with started(["sh", "-c", told.replace("--device cuda", "--device cpu")], tmp_path / "cache", **cluster) as server:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert asked(places.status, NODE[probe]["httpGet"]["path"])[0] == 200, server.log
        assert server.stop(signal.SIGTERM, POD["terminationGracePeriodSeconds"]) == 0
