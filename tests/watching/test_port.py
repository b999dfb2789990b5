"""The status port answers probes and readers, says nothing secret, and cannot be made to do anything."""

import asyncio
import hashlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import torch

from cloud_node import node, status, status_server
from cloud_node.config import ServeConfig
from cloud_node.engine import Load
from cloud_node.service import BackboneService
from cloud_node.status import Status, shown_name
from cloud_node.status_server import LOOPBACK, READERS, READERS_OF_ONE, StatusServer
from isthmus.errors import UnreachableError, UsageError
from isthmus.rows import Rows
from isthmus.settings import read_settings
from isthmus.wire.gen import backbone_pb2 as pb
from tests.faults.frames import wire
from tests.faults.training import wait_until
from tests.harness import serving
from tests.watching.conftest import CANARY, OPEN, WIDTH, Watched
from tests.watching.reading import Page, StatusPort, total


def test_probes_say_that_the_node_lives_and_is_ready(watched: Watched) -> None:
    assert [watched.status.get(path).code for path in ("/healthz", "/readyz")] == [200, 200]


def test_a_node_that_is_asked_to_stop_lives_on_but_is_not_ready(tiny_models: dict[str, Path], cache: Path) -> None:
    rows = Rows((200,) * 40, (0,) * 40)
    with (
        serving(tiny_models["llama"], "--cut", "1:1", "--status-port", "0", cache=cache) as server,
        wire(server.address, None, "reads-late") as stream,
    ):
        port = StatusPort.of(server)
        assert port.get("/readyz").code == 200
        assert stream.next().HasField("opened")
        for number in range(1, 25):  # more than a connection holds: until they are read the node cannot be done
            stream.call(number, pb.PASS_FORWARD, torch.ones(rows.tokens, WIDTH), rows=rows)
        wait_until(lambda: port.figures()["passes"]["forward"]["answered"] == 24, "the answers")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: port.get("/readyz").text == "draining\n", "the node to say that it drains")
        assert (port.get("/readyz").code, port.get("/healthz").code) == (503, 200)
        assert port.figures()["draining"] is True
        assert sum(frame.HasField("reply") for frame in stream) == 24
        assert server.process.wait(20) == 0


def status_of(load: Any) -> Status:
    """The status of a service of which the load alone is asked."""
    told = Status()
    well = SimpleNamespace(missing=lambda within_s: None, wedged=False)
    told.service = cast(BackboneService, SimpleNamespace(load=load, draining=False, health=well))
    return told


def test_a_node_whose_engine_fails_or_hangs_or_runs_no_span_is_not_ready_and_is_asked_once_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(status, "ANSWER_WITHIN_S", 0.05)
    release, asked = threading.Event(), []

    def hangs() -> Load:
        asked.append(1)
        release.wait(20)
        return Load()

    def fails() -> Load:
        raise UnreachableError("no replica answers")

    def ready(told: Status) -> bool:
        return told.missing(told.load()) is None

    assert not ready(status_of(lambda: Load(replicas=0)))
    slow = status_of(hangs)
    assert [ready(slow), ready(slow), len(asked)] == [False, False, 1]
    release.set()
    wait_until(lambda: ready(slow), "the engine to answer")
    assert not ready(status_of(fails))


def test_the_figures_are_those_of_the_session_that_is_open(watched: Watched) -> None:
    told = watched.status.figures()
    (session,) = (each for each in told["sessions"]["shown"] if each["name"] == shown_name(OPEN))
    assert (session["kind"], session["cut"], session["connected"], session["answered"]) == ("train", "1:1", True, 1)
    assert session["in_bytes"] > session["out_bytes"] > 8 * 32 * 4
    assert told["model"]["name"] == "tiny-llama"
    assert told["model"]["blocks"] == 6
    assert told["memory"]["resident_bytes"] > 0
    assert told["load"]["budget_bytes"] == 4 << 30


@pytest.mark.parametrize("path", ["/", "/status.json", "/metrics", "/healthz", "/readyz", "/nothing"])
def test_every_answer_forbids_keeping_guessing_and_running_anything_else(watched: Watched, path: str) -> None:
    headers = watched.status.get(path).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "Python" not in headers["Server"]


def test_nothing_but_reading_known_paths_is_possible(watched: Watched) -> None:
    assert [watched.status.get(path).code for path in ("/nothing", "/../etc/passwd", "/status.json?x=1")] == [
        404,
        404,
        200,
    ]
    assert said_to("POST", watched.status).startswith("HTTP/1.0 501")
    assert said_to("DELETE", watched.status).startswith("HTTP/1.0 501")


def said_to(verb: str, port: StatusPort) -> str:
    with connection(port) as line:
        line.sendall(f"{verb} / HTTP/1.0\r\n\r\n".encode())
        return line.recv(100).decode()


@contextmanager
def connection(port: StatusPort, of: str = LOOPBACK) -> Iterator[socket.socket]:
    """A line from an address of this machine."""
    where = urlsplit(port.url)
    with socket.create_connection((where.hostname, where.port), timeout=20, source_address=(of, 0)) as line:
        yield line


def test_readers_that_say_nothing_hold_neither_the_port_nor_the_node_for_long(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_server, "WITHIN_S", 1.0)
    with readable(status_of(Load)) as port, ExitStack() as lines:
        idle = [lines.enter_context(connection(port, stranger(number))) for number in range(READERS)]
        assert lines.enter_context(connection(port)).recv(1) == b"", "one more is turned away"
        began = time.monotonic()
        assert {line.recv(1) for line in idle} == {b""}
        assert time.monotonic() - began < 5
        wait_until(lambda: is_alive(port), "room for a reader")


def is_alive(port: StatusPort) -> bool:
    """Whether the port answers; it may turn a reader away."""
    with suppress(OSError):
        return port.get("/healthz").code == 200
    return False


def stranger(number: int) -> str:
    """An address of this machine that as many lines come from as one may have."""
    return f"127.0.0.{2 + number // READERS_OF_ONE}"


def test_one_stranger_who_holds_lines_open_turns_nobody_else_away() -> None:
    with readable(status_of(Load)) as port, ExitStack() as lines:
        for _ in range(READERS_OF_ONE):
            lines.enter_context(connection(port, "127.0.0.2"))
        for _ in range(READERS):
            assert lines.enter_context(connection(port, "127.0.0.2")).recv(1) == b""
        assert [port.get(path).code for path in ("/healthz", "/readyz")] == [200, 200]


@contextmanager
def readable(told: Status) -> Iterator[StatusPort]:
    """The status port of a node."""
    server = StatusServer(told, LOOPBACK, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield StatusPort(f"http://{LOOPBACK}:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_an_engine_without_a_copy_of_the_span_is_said_not_to_be_ready() -> None:
    with readable(status_of(lambda: Load(replicas=0))) as port:
        assert port.get("/healthz").code == 200
        assert (port.get("/readyz").code, port.get("/readyz").text) == (503, "no copy of the span runs\n")


def test_a_node_that_still_loads_its_model_lives_and_says_what_it_waits_for() -> None:
    loading = Status(certificate_until=4e9)
    with readable(loading) as port:
        assert port.get("/healthz").code == 200
        assert (port.get("/readyz").code, port.get("/readyz").text) == (503, "loading the model\n")
        told, series = port.figures(), port.series()
        assert (told["ready"], told["missing"]) == (False, "loading the model")
        assert told["certificate_s"] == pytest.approx(4e9 - time.time(), abs=60)
        assert total(series, "isthmus_ready") == 0
        assert total(series, "isthmus_certificate_expiry_timestamp_seconds") == 4e9
        loading.service = status_of(Load).service
        assert port.get("/readyz").code == 200


def test_the_port_is_open_before_the_model_is_loaded(
    tiny_models: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Page] = []

    def loads(settings: ServeConfig, key: object) -> BackboneService:
        found.append(StatusPort(f"http://{LOOPBACK}:{settings.status_port}").get("/readyz"))
        raise UnreachableError("enough was seen")

    monkeypatch.setattr(node, "build_service", loads)
    flags = {"model": str(tiny_models["llama"]), "listen": f"127.0.0.1:{free_port()}", "status_port": free_port()}
    with pytest.raises(UnreachableError, match="enough was seen"):
        asyncio.run(node._serve(read_settings(ServeConfig, None, flags)))
    assert [(page.code, page.text) for page in found] == [(503, "loading the model\n")]


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


def test_a_short_name_of_a_session_is_shown_no_more_than_a_long_one() -> None:
    shown = {name: shown_name(name) for name in ("a", "run-1", OPEN)}
    assert shown == {name: hashlib.blake2b(name.encode(), digest_size=4).hexdigest() for name in shown}
    assert {len(each) for each in shown.values()} == {8}


def test_the_port_is_on_loopback_wherever_the_node_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(node.status_server, "start", lambda of, host, port: told.append(host))
    for flags in ({}, {"status_host": "0.0.0.0"}):  # noqa: S104 (nothing is bound)
        flags |= {"model": "m", "listen": "0.0.0.0:0", "insecure": True, "status_port": 0}
        node.serve_status(read_settings(ServeConfig, None, flags), None)
    assert told == [LOOPBACK, "0.0.0.0"]  # noqa: S104


def test_a_host_without_a_port_is_refused() -> None:
    with pytest.raises(UsageError, match="give --status-port with it"):
        read_settings(ServeConfig, None, {"model": "m", "status_host": "0.0.0.0"})  # noqa: S104


def test_one_port_for_both_is_refused() -> None:
    with pytest.raises(UsageError, match="both ask for port 7070"):
        read_settings(ServeConfig, None, {"model": "m", "listen": "127.0.0.1:7070", "status_port": 7070})


def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="--status-port") as refused:
        status_server.start(status_of(Load), LOOPBACK, taken.getsockname()[1])
    assert "\n" not in str(refused.value)


def test_neither_text_nor_keys_nor_folders_nor_anybodys_name_can_be_read(watched: Watched) -> None:
    told = "".join(watched.status.get(path).text for path in ("/", "/status.json", "/metrics"))
    keys = [line for key in watched.owner.rglob("*.key") for line in key.read_text().splitlines()]
    keys += (watched.owner / "server" / "key.pem").read_text().splitlines()[1:-1]
    for secret in (CANARY, OPEN, "alice", str(watched.owner), *keys):
        assert secret not in told, secret
    log = json.dumps(watched.server.log)
    for secret in (CANARY, *keys):
        assert secret not in log, secret
