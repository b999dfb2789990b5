"""What a node writes down: every session, call and refusal, with the edge's own figures; and nothing that was sent."""

import json
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cloud_node.audit_reading import lines, usage, verify
from edge_client.config import TrainConfig
from isthmus.errors import AuditError
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from tests.bad_input.raw import Client, RawStream, describe, hidden, opening, request
from tests.faults.training import run_here, settings, wait_until
from tests.harness import Server, byte_tokenizer, run_command, serving
from tests.truth.runs import ledger_bytes
from tests.watching.reading import StatusPort

CANARY = "xyzzy-plugh-4711"
ROWS = (5, 3)


@dataclass
class Audited:
    """A node with an audit log, and who trained on it."""

    server: Server
    file: Path
    owner: Path
    run: Path
    status: StatusPort

    def said(self) -> list[dict[str, Any]]:
        return [said for _, said, _ in lines(self.file)]

    def identity(self, name: str) -> Credentials:
        return Credentials.load(self.owner / name)


@pytest.fixture(scope="module")
def audited(tiny_models: dict[str, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    place = tmp_path_factory.mktemp("audit")
    owner, data, file = place / "owner", place / "rows.jsonl", place / "log" / "audit.jsonl"
    certificates.init_authority(owner)
    for name in ("alice", "bob"):
        certificates.issue(owner, name)
    data.write_text("".join(json.dumps({"text": f"{CANARY} {number}"}) + "\n" for number in range(16)))
    flags = ("--cut", "1:1", "--certs", str(owner / "server"), "--audit", str(file), "--status-port", "0")
    with serving(
        tiny_models["llama"], *flags, "--log-format", "json", "--log-level", "debug", cache=place / "cache"
    ) as server:
        config: TrainConfig = settings(server, data, certs=owner / "alice", steps=4, microbatches=2)
        run_here(config, place / "run")
        yield Audited(server, file, owner, place / "run", StatusPort.of(server))


def closed(audited: Audited, count: int = 1) -> list[dict[str, Any]]:
    def found() -> list[dict[str, Any]]:
        return [said for said in audited.said() if said["action"] == "close"]

    wait_until(lambda: len(found()) >= count, "a session to be closed")
    return found()


def test_a_run_is_one_session_with_the_bytes_and_flops_that_its_own_ledger_has(audited: Audited) -> None:
    (session,) = closed(audited)[:1]
    ledger = [json.loads(line) for line in (audited.run / "ledger.jsonl").read_text().splitlines()]
    flops = sum(
        line.get(f"cloud_{way}_flops", 0) for line in ledger if "at" not in line for way in ("forward", "backward")
    )
    assert session["flops"] == flops > 0
    told = {way: sum(bytes_by_phase.values()) for way, bytes_by_phase in ledger_bytes(audited.run).items()}
    outside = [said for said in audited.said() if said["action"] in ("describe", "fetch-ends")]
    up, down = (session[name] + sum(said[name] for said in outside) for name in ("received_bytes", "sent_bytes"))
    assert (up, down) == (told["up"], told["down"])
    metrics = [json.loads(line) for line in (audited.run / "metrics.jsonl").read_text().splitlines()]
    assert session["tokens"] == metrics[-1]["tokens"]
    (opened,) = (said for said in audited.said() if said["action"] == "open" and said["object"] == session["object"])
    assert (opened["actor"], opened["kind"], opened["cut"]) == ("spiffe://isthmus/edge/alice", "train", "1:1")
    assert len(opened["certificate"]) == 64
    (used,) = (each for each in usage(audited.file) if each.tenant == "spiffe://isthmus/edge/alice")
    assert (used.sessions, used.flops, used.received_bytes) == (1, flops, told["up"])


def test_who_is_refused_is_written_down_with_the_errors_name(audited: Audited) -> None:
    bob = audited.identity("bob")
    card = describe(audited.server.address, bob)
    with RawStream(audited.server.address, bob) as stream:
        stream.send(pb.ClientFrame(open=opening(card, CANARY, bottom=3)))
        stream.finish()
    with Client(audited.server.address, bob, opening(card, "bobs")) as client:
        assert client.ask(*request(1, [hidden(*ROWS)[:, :-1].contiguous()], rows=ROWS)).code
        client.ask(*request(2, [hidden(*ROWS)], rows=ROWS))
    bobs = [said for said in closed(audited, 2) if said["object"] == "bobs"]
    assert [(said["requests"], said["refused"], said["tokens"]) for said in bobs] == [(1, 1, sum(ROWS))]
    refused = [said for said in audited.said() if said["outcome"] != "ok"]
    assert [(said["action"], said["actor"], said["outcome"], said["object"]) for said in refused] == [
        ("open", "spiffe://isthmus/edge/bob", "cut", "")
    ]
    (used,) = (each for each in usage(audited.file) if each.tenant.endswith("bob"))
    assert (used.sessions, used.calls, used.refusals, used.requests, used.refused) == (1, 1, 1, 1, 1)


def test_nothing_that_was_sent_or_is_secret_stands_anywhere(
    audited: Audited, capfd: pytest.CaptureFixture[str]
) -> None:
    ids = byte_tokenizer()(CANARY)["input_ids"]
    keys = [path.read_bytes() for path in audited.owner.rglob("*.key")] + [
        (audited.owner / name / "key.pem").read_bytes() for name in ("alice", "bob", "server")
    ]
    secrets = [CANARY.encode(), *(separator.join(map(str, ids)).encode() for separator in (", ", ",", " "))]
    secrets += [line for key in keys for line in key.splitlines() if len(line) > 30 and b"PRIVATE" not in line]
    said = capfd.readouterr()
    public = audited.status.get("/metrics").text + audited.status.get("/status.json").text + said.out + said.err
    places = {
        "the audit log": audited.file.read_bytes(),
        "the log": audited.server.log.encode(),
        "the page": public.encode(),
    }
    for name, content in places.items():
        assert content
        for secret in secrets:
            assert secret not in content, f"{secret!r} stands in {name}"
    assert str(audited.run).encode() not in audited.file.read_bytes()


def test_the_newest_hash_is_in_the_log_and_on_the_page(audited: Audited) -> None:
    start = next(json.loads(line) for line in audited.server.lines if "audit log: line" in line)
    assert verify(audited.file, start["message"].split()[-1])
    shown = audited.status.figures()["audit"]
    assert verify(audited.file, shown["hash"])[0] >= shown["line"]


def test_the_command_verifies_and_exports(audited: Audited, tmp_path: Path, cache: Path) -> None:
    def audit(*arguments: str | Path) -> Any:
        return run_command("cloud_node", "audit", *arguments, cache=cache)

    good = audit("verify", audited.file, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["lines"] == len(audited.said())
    table = audit("usage", audited.file, "--format", "csv")
    assert table.stdout.splitlines()[0].startswith("tenant,sessions,calls,")
    assert "spiffe://isthmus/edge/alice,1," in table.stdout
    assert "alice" not in audit("usage", audited.file, "--to", "2020-01-01").stdout
    damaged = tmp_path / "audit.jsonl"
    damaged.write_bytes(audited.file.read_bytes().replace(b'"outcome":"cut"', b'"outcome":"ok" ', 1))
    bad = audit("verify", damaged)
    assert bad.returncode == AuditError.exit_code
    assert "line" in bad.stderr
    assert len(bad.stderr.strip().splitlines()) == 1


@pytest.fixture
def short_lived(tiny_models: dict[str, Path], tmp_path: Path) -> Callable[[], Any]:
    flags = ("--cut", "1:1", "--audit", str(tmp_path / "audit.jsonl"))
    return lambda: serving(tiny_models["llama"], *flags, cache=tmp_path / "cache")


def test_a_killed_node_leaves_an_open_session_and_the_next_one_goes_on(
    short_lived: Callable[[], Any], tmp_path: Path
) -> None:
    with short_lived() as server, RawStream(server.address, None) as stream:
        stream.send(pb.ClientFrame(open=opening(describe(server.address, None), "left")))
        assert stream.receive() is not None
        server.process.kill()
        server.process.wait(10)
    with short_lived() as server:
        describe(server.address, None)
        server.stop(signal.SIGTERM)
    told = [(said["action"], said["object"]) for _, said, _ in lines(tmp_path / "audit.jsonl")][1:]
    assert told == [("start", ""), ("describe", ""), ("open", "left"), ("start", ""), ("describe", ""), ("stop", "")]


def test_a_node_that_cannot_write_takes_nothing_new_until_it_can(
    short_lived: Callable[[], Any], tmp_path: Path
) -> None:
    with short_lived() as server:
        card = describe(server.address, None)
        with Client(server.address, None, opening(card, "before")) as client:
            room = (tmp_path / "audit.jsonl").stat().st_size + 10
            _, most = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (room, -1))
            assert client.ask(*request(1, [hidden(*ROWS)], rows=ROWS)).tensor is not None
            with RawStream(server.address, None) as stream:
                stream.send(pb.ClientFrame(open=opening(card, "new")))
                first = stream.receive()
                if first is not None and first.HasField("opened"):  # the line that meets the limit is this session's
                    with RawStream(server.address, None) as another:
                        another.send(pb.ClientFrame(open=opening(card, "newer")))
                        first = another.receive()
                assert first is not None
                assert first.failure.code == "audit"
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, -1))
            describe(server.address, None)
    assert verify(tmp_path / "audit.jsonl")[0] > 3
