"""Doctor names what a server refuses or lacks, measures the line within bounds, and leaves nothing behind."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from edge_client import doctor_here
from edge_client.doctor import CHECKS, examine
from edge_client.examined import Patient
from isthmus import PROTOCOL, __version__
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from isthmus.wire.options import TIME
from tests.doctor.conftest import Look, failed
from tests.faults.training import wait_until
from tests.harness import Server, run_command, serving
from tests.watching.reading import StatusPort


@pytest.fixture(scope="module")
def node(tiny_models: dict[str, Path], cache: Path, issued: Path) -> Iterator[Server]:
    flags = ("--cut", "1:1", "--certs", str(issued / "server"), "--status-port", "0")
    with serving(tiny_models["llama"], *flags, cache=cache) as server:
        yield server
        assert "Traceback" not in server.log, server.log


def test_a_server_that_is_well_passes_every_check_and_nothing_is_left_there(
    node: Server, issued: Path, cache: Path
) -> None:
    certs = ("--server", node.address, "--certs", issued / "alice")
    done = run_command("edge_client", "doctor", *certs, "--json", cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert [each["check"] for each in told["checks"]] == [check.name for check in CHECKS]
    assert {each["outcome"] for each in told["checks"]} <= {"pass", "warn"}
    figures = {each["check"]: each["figures"] for each in told["checks"]}
    assert 0 < figures["round trip"]["least_s"] <= figures["round trip"]["median_s"] <= figures["round trip"]["most_s"]
    assert 0 < figures["bandwidth"]["sent_bytes"] < 5 << 20
    assert figures["bandwidth"]["up_bytes_per_s"] > 0 < figures["bandwidth"]["down_bytes_per_s"]
    left = StatusPort.of(node).figures()
    assert (left["sessions"]["open"], left["load"]["held_bytes"]) == (0, 0)
    assert left["bytes"]["in"] < 16 << 20, "all requests together"


def test_people_get_a_line_for_each_check(node: Server, issued: Path, cache: Path) -> None:
    done = run_command("edge_client", "doctor", "--server", node.address, "--certs", issued / "alice", cache=cache)
    lines = done.stdout.splitlines()
    assert len(lines) == len(CHECKS), done.stdout
    assert all(line.split()[0] in ("pass", "warn") for line in lines)
    wrong = run_command("edge_client", "doctor", "--server", node.address, cache=cache)
    assert wrong.returncode == 8
    assert any(line.startswith("fail  handshake") and "--certs DIR" in line for line in wrong.stdout.splitlines())


class Stub(pb_grpc.BackboneServicer):
    """A server of one cut that refuses what it is told to."""

    def __init__(self, card: pb.ModelCard, refusal: grpc.StatusCode | None, ahead_s: float, opening: str) -> None:
        self._card, self._refusal, self._ahead_s, self._opening = card, refusal, ahead_s, opening

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.ModelCard:  # noqa: N802
        if self._refusal is not None:
            context.abort(self._refusal, "by somebody between")
        context.send_initial_metadata(((TIME, f"{time.time() + self._ahead_s}"),))
        return self._card

    def Exchange(  # noqa: N802
        self, frames: Iterator[pb.ClientFrame], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerFrame]:
        yield pb.ServerFrame(failure=pb.Failure(code=self._opening, message="not now; come back"))


def card(**changes: object) -> pb.ModelCard:
    offer = pb.CutOffer(bottom=1, top=1, ends_bundle="0" * 64, ends_bytes=1000)
    good = {"protocol": PROTOCOL, "server_version": __version__, "model": "m", "blocks": 6, "hidden_size": 8}
    return pb.ModelCard(**{**good, "cuts": [offer], "identity": "cn:alice", **changes})


@contextmanager
def stub(
    refusal: grpc.StatusCode | None = None, ahead_s: float = 0.0, opening: str = "draining", **changes: object
) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_BackboneServicer_to_server(Stub(card(**changes), refusal, ahead_s, opening), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


@pytest.mark.parametrize(
    ("refusal", "exit_code", "words"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, 9, "ask the model owner to allow"),
        (grpc.StatusCode.UNAUTHENTICATED, 8, "ask the model owner for an identity"),
        (grpc.StatusCode.UNIMPLEMENTED, 5, "is not an Isthmus cloud node"),
    ],
)
def test_a_server_that_does_not_let_this_edge_in(
    refusal: grpc.StatusCode, exit_code: int, words: str, look: Look
) -> None:
    with stub(refusal) as port:
        found = look(port)
    assert failed(found) == [("versions", exit_code)]
    assert words in found["versions"].says


def test_other_versions_fail_by_protocol_and_are_warned_of_else(look: Look) -> None:
    with stub(protocol=999) as port:
        found = look(port)
    assert failed(found) == [("versions", 7)]
    with stub(server_version="9.9") as port:
        found = look(port)
    assert found["versions"].outcome == "warn"
    assert "isthmus 9.9" in found["versions"].says


@pytest.mark.parametrize(("ahead_s", "outcome"), [(400, "warn"), (-400, "warn"), (100, "pass")])
def test_clocks_that_disagree_by_more_than_five_minutes_are_warned_of(ahead_s: float, outcome: str, look: Look) -> None:
    with stub(ahead_s=ahead_s) as port:
        found = look(port)["clock"]
    assert found.outcome == outcome
    assert found.figures["ahead_s"] == pytest.approx(ahead_s, abs=30)
    assert ("ahead of" if ahead_s > 0 else "behind") in found.says


@pytest.mark.parametrize(
    ("opening", "exit_code"), [("draining", 11), ("limit", 6), ("forbidden", 9)], ids=["draining", "full", "forbidden"]
)
def test_a_server_that_opens_no_session(opening: str, exit_code: int, look: Look) -> None:
    with stub(opening=opening) as port:
        found = look(port)
    assert failed(found) == [("session", exit_code)]
    assert found["session"].says == "not now; come back"
    assert found["health"].outcome == "skip", "an older server has no health service"


def test_a_server_without_a_cut(look: Look) -> None:
    with stub(cuts=[]) as port:
        assert failed(look(port)) == [("model", 4)]


def test_a_server_that_says_it_is_not_well(look: Look) -> None:
    def ill(request: bytes, context: grpc.ServicerContext) -> bytes:
        return b"\x08\x02"

    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_BackboneServicer_to_server(Stub(card(), None, 0.0, "draining"), server)
    calls = {"Check": grpc.unary_unary_rpc_method_handler(ill)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", calls),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    found = look(port)
    server.stop(None)
    assert failed(found) == [("health", 11), ("session", 11)]
    assert "it drains, or its span is stuck" in found["health"].says


def test_a_disk_or_memory_that_is_too_small_for_the_ends(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_here, "_free_memory", lambda: 2000)
    with stub() as port:
        assert look(port)["room"].outcome == "warn"
        monkeypatch.setattr(doctor_here.shutil, "disk_usage", lambda place: SimpleNamespace(free=999))
        found = look(port)["room"]
    assert (found.outcome, found.exit_code) == ("fail", 12)
    assert "make room, or set ISTHMUS_CACHE" in found.says


def test_a_run_of_doctor_that_is_stopped_leaves_no_session(node: Server, issued: Path, tmp_path: Path) -> None:
    looking = examine(Patient(node.address, issued / "alice", False, tmp_path, lambda words: None))
    for found in looking:
        if found.check == "token":
            break
    assert StatusPort.of(node).figures()["sessions"]["open"] == 1
    looking.close()
    wait_until(lambda: StatusPort.of(node).figures()["sessions"]["open"] == 0, "the session's end")
