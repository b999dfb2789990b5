"""What the files of deploy/ start runs: nodes answer their probes, edges train, and all end when they are told."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import CertificateError
from isthmus.trust.credentials import Credentials
from tests.deploy.places import of_container, of_host, of_service
from tests.deploy.running import (
    MODEL,
    as_a_secret,
    asked,
    checked,
    fewer_steps,
    lay_out,
    outer_address,
    script,
    started,
    trained,
)
from tests.deploy.written import DEPLOY, compose, images, setting, the, told, words_of

POD = the("Deployment", "isthmus-cloud")["spec"]["template"]["spec"]
NODE, CERTS = POD["containers"][0], POD["initContainers"][0]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README has an operator lay out."""
    return lay_out(tmp_path_factory.mktemp("owner"))


@pytest.fixture
def secret(site: Path, tmp_path: Path) -> Path:
    """The Secret that the README has an operator make, as it is mounted."""
    (made,) = [words for words in told() if words[:3] == ["kubectl", "create", "secret"]]
    assert made[4] == POD["volumes"][1]["secret"]["secretName"]
    (folder,) = [word.partition("=")[2] for word in made if word.startswith("--from-file=")]
    return as_a_secret(site.parents[1] / folder, tmp_path / "secret")


def report(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text()))


def test_keys_from_a_secret_are_taken_once_the_init_container_has_copied_them(secret: Path, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="open to other users"):
        Credentials.load(secret)
    (tmp_path / "certs").mkdir()
    copying = script(words_of(CERTS), of_container(CERTS, tmp_path))
    subprocess.run(["/bin/sh", "-c", copying], check=True, timeout=30)
    Credentials.load(tmp_path / "certs").signing_key()


@pytest.mark.timeout(240)
def test_the_node_of_kubernetes_answers_its_probes_serves_the_edge_of_systemd_and_ends_in_time(
    site: Path, secret: Path, tmp_path: Path
) -> None:
    for mount in ("certs", "cache"):
        (tmp_path / mount).mkdir()
    subprocess.run(["/bin/sh", "-c", script(words_of(CERTS), of_container(CERTS, tmp_path))], check=True, timeout=30)
    (tmp_path / "models").symlink_to(site / "models")
    places = of_container(NODE, tmp_path)
    places.copy(DEPLOY / "kubernetes/serve.yaml", tmp_path / "config/serve.yaml")

    host = of_host(tmp_path / "edge")
    edge = type(host)(host.paths, places.grpc, places.status)
    settings = edge.copy(DEPLOY / "systemd/reviews.yaml", tmp_path / "edge/etc/isthmus/reviews.yaml")
    fewer_steps(settings)
    (tmp_path / "edge/etc/isthmus/certs").symlink_to(site.parents[1] / "certs")
    (tmp_path / "edge/var/lib/isthmus").mkdir(parents=True)
    (tmp_path / "edge/var/lib/isthmus/data").symlink_to(site / "data/edge-a")
    begin = setting("isthmus-edge@.service", "ExecStart").replace("%i", "reviews").split()

    with started(places.words(words_of(NODE)), tmp_path / "cache") as server:
        for probe in PROBES:
            question = NODE[probe]["httpGet"]
            assert question["port"] == "status"
            assert asked(places.status, question["path"], outer_address())[0] == 200, probe
        assert checked(images()["isthmus-cloud"].health, places) == 0
        with trained(edge.words(begin), tmp_path / "edge-cache") as training:
            said, _ = training.communicate(timeout=120)
        assert training.returncode == 0, said
        found = report(tmp_path / "edge/var/lib/isthmus/reviews")
        assert (found["status"], found["steps"]) == ("complete", 3)
        again = subprocess.run(edge.words(begin), capture_output=True, text=True, timeout=30, check=True)
        assert "complete" in again.stdout
        before = time.monotonic()
        assert server.stop(signal.SIGTERM, POD["terminationGracePeriodSeconds"]) == 0
        assert time.monotonic() - before < POD["terminationGracePeriodSeconds"]
    assert checked(images()["isthmus-cloud"].health, places) != 0


@pytest.mark.timeout(240)
def test_the_node_of_compose_serves_both_its_edges_and_prometheus(site: Path, tmp_path: Path) -> None:
    services = compose({"ISTHMUS_SITE": str(site)})["services"]
    cloud = of_service(services["cloud"], tmp_path)
    words = [*images()["isthmus-cloud"].entrypoint, *services["cloud"]["command"]]
    assert f"--model=/models/{MODEL}" in words
    with started(cloud.words(words), tmp_path / "cloud-cache") as server:
        assert checked(services["cloud"]["healthcheck"]["test"][1:], cloud) == 0
        edges = {}
        for name in ("edge-a", "edge-b"):
            mounted = of_service(services[name], tmp_path)
            places = type(mounted)(mounted.paths, cloud.grpc, cloud.status)
            command = [str(DEPLOY / services[name]["entrypoint"][0]), *places.words(services[name]["command"])]
            edges[name] = trained(command, tmp_path / f"{name}-cache")
        for name, training in edges.items():
            with training:
                said, _ = training.communicate(timeout=150)
            assert training.returncode == 0, said
            assert report(site / "runs" / name / "first")["status"] == "complete"
        code, figures = asked(cloud.status, "/metrics", outer_address())
        assert code == 200
        assert "isthmus" in figures
        assert server.stop() == 0
