"""Doctor names what is wrong between an edge and a server, with its remedy, and looks no further than makes sense."""

import io
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from edge_client import doctor_cli, doctor_line
from edge_client.doctor import CHECKS, exit_code
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from isthmus.trust.proxy import proxy_for
from tests.bad_input.test_connection import expired
from tests.doctor.conftest import Look, failed
from tests.retry.lines import answering, scripted


def test_a_name_that_does_not_resolve(look: Look) -> None:
    found = look("no-such-host.invalid:7070", insecure=True)
    assert failed(found) == [("name", 11)]
    assert "check its spelling" in found["name"].says
    assert found["connection"].outcome == found["bandwidth"].outcome == "skip"
    assert list(found) == [check.name for check in CHECKS], "every check is named, those too that make no sense now"


def test_a_port_where_nothing_listens(look: Look) -> None:
    found = look(1)
    assert failed(found) == [("connection", 11)]
    assert "nothing listens at 127.0.0.1:1" in found["connection"].says


def test_a_port_that_does_not_answer(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_line, "WITHIN_S", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port, waiting = full.getsockname()[1], [socket.socket() for _ in range(4)]
        for line in waiting:  # more than wait in line there, so that the next has no place
            line.setblocking(False)
            line.connect_ex(("127.0.0.1", port))
        found = look(port)
        for line in waiting:
            line.close()
    assert failed(found) == [("connection", 11)]
    assert "firewall" in found["connection"].says


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        ("server", "has expired: ask the model owner"),
        ("elsewhere", "is for gpu.example.org: dial one of these"),
        ("", "speaks plaintext though certificates were given"),
    ],
)
def test_a_certificate_that_does_not_fit(identity: str, words: str, look: Look, issued: Path, tmp_path: Path) -> None:
    there = Credentials.load(issued / identity) if identity else None
    if identity == "server":
        old = expired(issued, "server", tmp_path / "old")
        there = Credentials(*((old / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")), old)
    with scripted(answering, there) as server:
        found = look(server.port, issued / "alice")
    assert failed(found) == [("handshake", 8)]
    assert words in found["handshake"].says


def test_a_server_of_another_authority_and_an_identity_of_another(look: Look, issued: Path, tmp_path: Path) -> None:
    certificates.init_authority(tmp_path / "stranger")
    certificates.issue(tmp_path / "stranger", "alice")
    mixed = Path(shutil.copytree(tmp_path / "stranger" / "alice", tmp_path / "mixed"))
    shutil.copy(issued / "alice" / "ca.pem", mixed / "ca.pem")
    with scripted(answering, Credentials.load(issued / "server")) as server:
        found = look(server.port, tmp_path / "stranger" / "alice")
        assert failed(found) == [("handshake", 8)]
        assert "is not from the authority" in found["handshake"].says
        found = look(server.port, mixed)
        assert failed(found) == [("handshake", 8)]
        assert "the server refused" in found["handshake"].says
        found = look(server.port)
        assert failed(found) == [("handshake", 8)]
        assert "wants TLS: give the folder" in found["handshake"].says


def test_an_identity_that_ran_out_or_is_open_to_others_and_what_else_is_wrong(
    look: Look, issued: Path, tmp_path: Path
) -> None:
    old = expired(issued, "alice", tmp_path / "old")
    found = look(1, old)
    assert failed(found) == [("identity", 8), ("connection", 11)], "one run tells both"
    assert "expired on" in found["identity"].says
    assert exit_code(list(found.values())) == 8
    seen = Path(shutil.copytree(issued / "alice", tmp_path / "seen"))
    (seen / "key.pem").chmod(0o644)
    found = look(1, seen)
    assert failed(found)[0] == ("identity", 8)
    assert f"chmod 600 {seen / 'key.pem'}" in found["identity"].says
    found = look("192.0.2.1:7070")
    assert failed(found)[0] == ("identity", 2)
    assert "give --certs DIR" in found["identity"].says


def test_certificates_that_end_soon_are_warned_of_on_either_side(look: Look, issued: Path) -> None:
    with scripted(answering, Credentials.load(issued / "tomorrow")) as server:
        found = look(server.port, issued / "bob")
    assert (found["identity"].outcome, found["certificate"].outcome) == ("warn", "warn")
    assert "expires in 24 hours: ask the model owner" in found["identity"].says
    assert "tell its owner to rotate it" in found["certificate"].says
    with scripted(answering, Credentials.load(issued / "server")) as server:
        found = look(server.port, issued / "alice")
    assert (found["identity"].outcome, found["certificate"].outcome) == ("pass", "pass")


@contextmanager
def connecting_proxy(answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy; its address, and the first line and credentials of all that asked."""
    asked: list[str] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            sink.close()

    def serve(caller: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n") and (more := caller.recv(1)):
            head += more
        asked.append(head.decode())
        caller.sendall(answer)
        if b" 200 " not in answer:
            caller.close()
            return
        host, _, port = head.split(b" ")[1].decode().rpartition(":")
        far = socket.create_connection((host, int(port)))
        for pair in ((caller, far), (far, caller)):
            threading.Thread(target=pump, args=pair, daemon=True).start()

    def accept() -> None:
        while True:
            try:
                caller, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(caller,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", asked


def test_a_proxy_is_named_and_looked_through_as_grpc_goes_through_it(
    look: Look, issued: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(answering, Credentials.load(issued / "server")) as server, connecting_proxy() as (place, asked):
        monkeypatch.setenv("https_proxy", f"http://who:secret@{place}")
        found = look(server.port, issued / "alice")
        told, target = found["proxy"].says, f"CONNECT 127.0.0.1:{server.port} HTTP/1.1"
        assert found["proxy"].outcome == "warn"
        assert f"https_proxy=http://{place} is in force" in told
        assert "secret" not in told
        assert [found[name].outcome for name in ("connection", "handshake", "certificate")] == ["pass"] * 3
        assert found["versions"].exit_code == 5, "gRPC reached it: it is a server without this call"
        agents = [head for head in asked if "grpc" in head.lower()]
        assert agents, asked
        assert all(head.startswith(target) for head in asked)
        assert all("Basic d2hvOnNlY3JldA==" in head for head in asked)
        monkeypatch.setenv("no_proxy", "10.0.0.0/8,127.0.0.0/8")
        before = len(asked)
        assert look(server.port, issued / "alice")["proxy"].outcome == "pass"
        assert len(asked) == before, "neither doctor nor gRPC goes there any more"


def test_a_proxy_that_refuses_is_named(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    with connecting_proxy(b"HTTP/1.1 403 Forbidden\r\n\r\n") as (place, _):
        monkeypatch.setenv("grpc_proxy", f"http://{place}")
        found = look("gpu.example.org:7070", insecure=True)
    assert failed(found)[-1] == ("connection", 11)
    assert "the proxy of grpc_proxy answered '403 Forbidden'" in found["connection"].says


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, None),
        ({"http_proxy": "http://a:1"}, "http_proxy=http://a:1"),
        ({"http_proxy": "http://a:1", "https_proxy": "http://b:2"}, "https_proxy=http://b:2"),
        ({"https_proxy": "http://b:2", "grpc_proxy": ""}, None),
        ({"https_proxy": "socks5://b:2"}, None),
        ({"https_proxy": "http://b:2", "no_proxy": "example.org"}, None),
        ({"https_proxy": "http://b:2", "no_proxy": "example.com, 10.0.0.0/8"}, "https_proxy=http://b:2"),
        ({"https_proxy": "http://b:2", "no_proxy": "example.org", "no_grpc_proxy": "x"}, "https_proxy=http://b:2"),
        ({"https_proxy": "http://b:port"}, None),
    ],
)
def test_which_variable_counts(environment: dict[str, str], named: str | None) -> None:
    found = proxy_for("gpu.example.org", environment)
    assert (None if found is None else str(found)) == named


def test_the_page_names_every_check_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    table = page.partition("| check |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE) == [check.name for check in CHECKS]


def test_a_check_that_takes_long_is_named_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cli, "SLOW_S", 0.0)
    said, shown = io.StringIO(), threading.Event()

    class Shown(Console):
        def print(self, *words: object, **more: object) -> None:
            said.write(" ".join(map(str, words)))
            shown.set()

    with doctor_cli._named_if_slow("bandwidth", Shown()):
        assert shown.wait(20)
    assert said.getvalue() == "... bandwidth"
