"""Every probe of a node rests on a real token: the standard health calls, `cloud_node health`, the status port."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import grpc
import pytest

from cloud_node import health_service
from cloud_node.health_service import WATCHERS, HealthService
from cloud_node.service import BackboneService
from isthmus.errors import CertificateError, UnreachableError
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import health_pb2 as pb
from tests.faults.training import wait_until
from tests.harness import ENVIRONMENT, Server, once_ready, run_command, serving
from tests.watching.reading import StatusPort

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
SERVING = b"\x08\x01"
"""HealthCheckResponse{status: SERVING}, as the standard's proto has it."""


@dataclass(frozen=True)
class Node:
    server: Server
    owner: Path

    @property
    def alice(self) -> Credentials:
        return Credentials.load(self.owner / "alice")

    def channel(self) -> grpc.Channel:
        return grpc.secure_channel(self.server.address, self.alice.channel())


@pytest.fixture(scope="module")
def node(tiny_models: dict[str, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    owner = tmp_path_factory.mktemp("owner")
    certificates.init_authority(owner)
    certificates.issue(owner, "alice")
    flags = ("--cut", "1:1", "--certs", str(owner / "server"), "--status-port", "0")
    with serving(tiny_models["llama"], *flags, cache=cache) as server:
        yield Node(server, owner)
        assert "Traceback" not in server.log, server.log


def test_the_standard_call_is_answered_byte_for_byte(node: Node) -> None:
    with node.channel() as channel:
        check = channel.unary_unary(CHECK)
        assert check(b"", timeout=20) == SERVING
        assert check(b"\x0a\x13isthmus.v1.Backbone", timeout=20) == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(b"\x0a\x05other", timeout=20)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_watching_tells_the_status_at_once(node: Node) -> None:
    with node.channel() as channel:
        watching = channel.unary_stream(WATCH)
        known, unknown = watching(b"", timeout=20), watching(b"\x0a\x05other", timeout=20)
        assert next(known) == SERVING
        assert next(unknown) == b"\x08\x03"
        known.cancel()
        unknown.cancel()


def test_who_has_no_certificate_is_not_even_told(node: Node) -> None:
    with grpc.insecure_channel(node.server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(CHECK)(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_asking_often_makes_the_node_compute_hardly_anything(node: Node) -> None:
    def passes() -> int:
        return sum(port.figures()["load"]["batches"].values())

    port = StatusPort.of(node.server)
    before = passes()
    with node.channel() as channel:
        check = channel.unary_unary(CHECK)
        assert {check(b"", timeout=20) for _ in range(300)} == {SERVING}
    assert passes() - before <= 3, "one in ten seconds"


def test_the_command_says_so_and_exits_with_it(node: Node, cache: Path) -> None:
    well = run_command(
        "cloud_node", "health", "--server", node.server.address, "--certs", node.owner / "alice", "--json", cache=cache
    )
    assert (well.returncode, json.loads(well.stdout)["serving"]) == (0, True)
    plain = run_command("cloud_node", "health", "--server", node.server.address, cache=cache)
    assert plain.returncode == CertificateError.exit_code
    assert "wants TLS" in plain.stderr
    nobody = run_command("cloud_node", "health", "--server", "127.0.0.1:1", cache=cache)
    assert nobody.returncode == UnreachableError.exit_code
    assert "nothing listens" in nobody.stderr


class AbortError(Exception):
    """What gRPC raises for a call that is refused."""


class Context:
    """Of a call that nobody is behind."""

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise AbortError(code)


def test_who_asks_at_once_shares_one_judgement_and_few_may_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_service, "EVERY_S", 0.01)
    judged, missing = [], [None]

    def judge(within_s: float) -> str | None:
        judged.append(1)
        return missing[0]

    node = SimpleNamespace(draining=False, health=SimpleNamespace(missing=judge))
    service, asked, context = HealthService(cast(BackboneService, node)), pb.HealthRequest(), Context()

    async def play() -> None:
        answers = await asyncio.gather(*(service.check(asked, context) for _ in range(50)))
        assert ({each.status for each in answers}, len(judged)) == ({pb.HealthAnswer.SERVING}, 1)
        watching = [service.watch(asked, context) for _ in range(WATCHERS)]
        assert (await anext(watching[0])).status == pb.HealthAnswer.SERVING
        missing[0] = "stuck"
        assert (await anext(watching[0])).status == pb.HealthAnswer.NOT_SERVING
        missing[0], node.draining = None, True
        assert (await service.check(asked, context)).status == pb.HealthAnswer.NOT_SERVING
        for other in watching[1:]:
            await anext(other)
        with pytest.raises(AbortError, match="RESOURCE_EXHAUSTED"):
            await anext(service.watch(asked, context))
        for other in watching:
            await other.aclose()
        again = service.watch(asked, context)
        assert (await anext(again)).status == pb.HealthAnswer.NOT_SERVING, "there is room again"
        await again.aclose()

    asyncio.run(play())


HANGING = """
import threading
from cloud_node import cli, health
from cloud_node.in_process import InProcessEngine
health.EVERY_S, health.LATE_S, health.WEDGED_S = 0.0, 0.2, 0.4
true, calls = InProcessEngine.forward, []
def forward(self, session, *rest, **more):
    calls.append(session)
    if len(calls) > 1:
        threading.Event().wait()
    return true(self, session, *rest, **more)
InProcessEngine.forward = forward
cli.main()
"""


def test_a_device_that_hangs_shows_at_every_probe_and_does_not_keep_the_node_from_ending(
    tiny_models: dict[str, Path], cache: Path
) -> None:
    command = [sys.executable, "-c", HANGING, "serve", "--model", str(tiny_models["llama"]), "--cut", "1:1"]
    command += ["--listen", "127.0.0.1:0", "--status-port", "0", "--threads", "1"]
    process = subprocess.Popen(
        command,
        env={**ENVIRONMENT, "ISTHMUS_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = once_ready(process)
    try:
        port = StatusPort.of(server)
        assert (port.get("/readyz").code, port.get("/healthz").code) == (200, 200)
        wait_until(lambda: port.get("/readyz").code == 503, "the device to be missed")
        assert "a token has been on its way through the span" in port.get("/readyz").text
        wait_until(lambda: port.get("/healthz").code == 503, "the node to be known as wedged")
        told = run_command("cloud_node", "health", "--server", server.address, cache=cache)
        assert told.returncode == UnreachableError.exit_code
        assert "is not serving" in told.stderr
        assert server.stop() == 0
    finally:
        process.kill()
