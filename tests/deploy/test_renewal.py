"""Certificates are renewed by the commands that the README tells: who meets whom then, and what goes on."""

import json
import subprocess
import time
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.trust.credentials import Credentials, diagnose, fingerprint, load_signer
from tests.deploy.engines import secret_of
from tests.deploy.places import Places, of_container, of_service
from tests.deploy.running import as_a_secret, asked, laid, lay_out, script, started, trained
from tests.deploy.written import DEPLOY, compose, images, renewals, the, told, words_of
from tests.faults.training import steps_done, wait_until
from tests.harness import Server
from tests.watching.reading import series_in, total

OF_COMPOSE, OF_KUBERNETES = renewals()
COPYING = the("Deployment", "isthmus-cloud")["spec"]["template"]["spec"]["initContainers"][0]
DAY_S = 86400
STEPS = 100
EXPIRY = "isthmus_certificate_expiry_timestamp_seconds"


class Services:
    """The cloud and an edge of compose as processes; each is recreated as by `--force-recreate`."""

    def __init__(self, site: Path, place: Path, running: ExitStack) -> None:
        self._services = compose({"ISTHMUS_SITE": str(site)})["services"]
        self._place, self._running = place, running
        self._cloud = of_service(self._services["cloud"], place)
        self.node: Server | None = None
        self.edge: subprocess.Popen[str] | None = None

    def recreate(self, name: str) -> None:
        """Stop the container as an engine does, where it runs, and start another."""
        start = self._start_node if name == "cloud" else self._start_edge
        start(self._services[name], self._place / f"{name}-cache")

    def certificate_until(self) -> float:
        """As the node tells it."""
        return total(series_in(asked(self._cloud.status, "/metrics")[1]), EXPIRY)

    def edge_goes_on(self, run: Path) -> None:
        """Wait until the edge has done a step more."""
        edge, before = self.edge, steps_done(run)
        assert edge is not None
        wait_until(lambda: steps_done(run) > before or edge.poll() is not None, "a step")
        assert edge.poll() is None, edge.communicate()

    def _start_node(self, service: dict[str, Any], cache: Path) -> None:
        if self.node is not None:
            assert self.node.stop(within_s=45) == 0
        words = [*images()["isthmus-cloud"].entrypoint, *service["command"]]
        self.node = self._running.enter_context(started(self._cloud.words(words), cache))

    def _start_edge(self, service: dict[str, Any], cache: Path) -> None:
        if self.edge is not None:
            self.edge.terminate()
            assert self.edge.wait(60) == 10, self.edge.communicate()  # stopped, not failed
        places = Places(of_service(service, self._place).paths, self._cloud.grpc, self._cloud.status)
        words = [str(DEPLOY / service["entrypoint"][0]), *places.words(service["command"])]
        self.edge = self._running.enter_context(trained(words, cache, STEPS))
        self._running.callback(self.edge.kill)


def test_an_edge_goes_on_while_the_node_is_renewed_and_after_it_is_renewed_itself(tmp_path: Path) -> None:
    site = lay_out(tmp_path)
    run = site / "runs/edge-a/first"
    with ExitStack() as running:
        services = Services(site, tmp_path, running)
        for name in ("cloud", "edge-a"):
            services.recreate(name)
        for words in OF_COMPOSE:
            services.edge_goes_on(run)
            laid(words, tmp_path)
            if words[0] == "docker":
                services.recreate(words[-1])
        assert services.edge is not None
        said, _ = services.edge.communicate(timeout=120)
        assert services.edge.returncode == 0, said
        old, new = (Credentials.load(site / "certs" / name).expires() for name in ("server.old", "server"))
        assert old < new == services.certificate_until()
    report = json.loads((run / "run.json").read_text())
    assert (report["status"], report["steps"], steps_done(run)) == ("complete", STEPS, STEPS)


def meet(server: Credentials, edge: Credentials) -> bool:
    """Whether a node with these certificates lets an edge with those in, and is believed."""
    node = grpc.server(futures.ThreadPoolExecutor(1))
    port = node.add_secure_port("localhost:0", server.server())
    node.start()
    try:
        return diagnose("localhost", port, edge) is None
    finally:
        node.stop(None)


@pytest.mark.parametrize(
    ("typed", "folder", "edge"), [(OF_COMPOSE, "deploy/site/certs", "edge-b"), (OF_KUBERNETES, "certs", "alice")]
)
def test_an_edges_old_certificate_meets_the_renewed_node_which_signs_as_before(
    typed: list[list[str]], folder: str, edge: str, tmp_path: Path
) -> None:
    lay_out(tmp_path)
    certs, old = tmp_path / folder, Credentials.load(tmp_path / folder / "server")
    for words in typed:
        laid(words, tmp_path)
    renewed, alice = Credentials.load(certs / "server"), Credentials.load(certs / edge)
    assert renewed.certificate != old.certificate
    assert renewed.key != old.key
    assert Credentials.load(certs / "server.old").certificate == old.certificate
    assert meet(renewed, alice)
    assert fingerprint(renewed.signing_key().public_key()) == fingerprint(alice.publisher())


def test_an_edge_that_is_renewed_first_meets_the_old_node_and_its_key_on_record_is_the_new_one(tmp_path: Path) -> None:
    lay_out(tmp_path)
    certs = tmp_path / "deploy/site/certs"
    before = Credentials.load(certs / "edge-a").signing_key().public_key()
    for words in OF_COMPOSE:
        if any("edge-a" in word for word in words):
            laid(words, tmp_path)
    renewed = Credentials.load(certs / "edge-a")
    now = fingerprint(renewed.signing_key().public_key())
    assert meet(Credentials.load(certs / "server"), renewed)
    assert now == fingerprint(load_signer(certs / "authority/issued/edge-a.pub")) != fingerprint(before)


def test_the_renewed_secret_of_kubernetes_is_what_the_pods_that_are_restarted_mount(tmp_path: Path) -> None:
    lay_out(tmp_path)
    for words in OF_KUBERNETES:
        laid(words, tmp_path)
    (made,) = [words for words in told() if words[:3] == ["kubectl", "create", "secret"]]
    (again,) = [words for words in OF_KUBERNETES if words[:3] == ["kubectl", "create", "secret"]]
    (restarted,) = [words[3] for words in OF_KUBERNETES if words[:2] == ["kubectl", "rollout"]]
    assert again == [*made, "--dry-run=client", "--output=yaml"]
    assert secret_of(restarted.removeprefix("deployment/")) == made[4]
    (tmp_path / "pod/certs").mkdir(parents=True)
    as_a_secret(tmp_path / made[-1].removeprefix("--from-file="), tmp_path / "pod/secret")
    copying = script(words_of(COPYING), of_container(COPYING, tmp_path / "pod"))
    subprocess.run(["/bin/sh", "-c", copying], check=True, timeout=30)
    assert 89 < (Credentials.load(tmp_path / "pod/certs").expires() - time.time()) / DAY_S <= 90


def test_containers_that_are_renewed_from_a_new_shell_run_as_the_user_whose_keys_they_are() -> None:
    assert [words for words in told() if words[0] == "export"] == OF_COMPOSE[:1]
