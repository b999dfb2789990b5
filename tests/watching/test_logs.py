"""With `--log-format json` a program can read the log; without, it is as it always was."""

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch

from cloud_node import logs
from cloud_node.calls import Limits
from cloud_node.config import ServeConfig
from cloud_node.engine import Engine
from cloud_node.exchange import SessionStream
from cloud_node.logs import OURS, JsonLines
from cloud_node.session import Session
from cloud_node.watch import Watch
from isthmus.cut import Cut
from isthmus.errors import LimitError, UsageError
from isthmus.settings import read_settings
from isthmus.wire.gen import backbone_pb2 as pb
from tests.faults.frames import wire
from tests.faults.training import run_here, settings, wait_until
from tests.harness import Server, serving
from tests.watching.conftest import OPEN, ROWS, WIDTH, Watched
from tests.watching.reading import json_lines

SESSION = Session("of-someone", "someone", Cut(1, 1), "none", "none", False, (), "")


def test_every_line_is_an_object_with_time_level_logger_and_message(watched: Watched) -> None:
    lines = json_lines(watched.server)
    assert len(lines) > 5
    for line in lines:
        assert {"time", "level", "logger", "message"} <= line.keys()
        assert datetime.fromisoformat(line["time"]).utcoffset() is not None


def test_a_session_is_named_with_its_tenant_when_it_opens_and_closes(watched: Watched) -> None:
    of_sessions = [line for line in json_lines(watched.server) if "session" in line]
    assert {line["tenant"] for line in of_sessions} == {"spiffe://isthmus/edge/alice"}
    (opened,) = (line for line in of_sessions if line["session"] == OPEN)
    assert (opened["level"], opened["message"].split()[2]) == ("INFO", "opened")
    assert any(line["message"].endswith("closed") for line in of_sessions)
    answered = [line for line in of_sessions if "error" not in line]
    assert not any("microbatch" in line for line in answered), "answers are logged at DEBUG alone"


def test_a_session_that_is_refused_is_a_warning_with_the_errors_name(watched: Watched) -> None:
    with wire(watched.server.address, watched.identity("alice"), "refused", cut=(4, 1)) as stream:
        assert [frame.failure.code for frame in stream] == ["cut"]
    refused = [line for line in json_lines(watched.server) if line.get("error") == "cut"]
    assert refused
    assert refused[-1]["level"] == "WARNING"
    assert refused[-1]["tenant"] == "spiffe://isthmus/edge/alice"


def test_a_request_that_is_refused_is_told_with_its_kind_session_microbatch_and_pass(watched: Watched) -> None:
    with wire(watched.server.address, watched.identity("alice"), "asks-wrongly") as stream:
        assert stream.next().HasField("opened")
        stream.call(9, pb.PASS_BACKWARD, torch.ones(ROWS.tokens, WIDTH + 1), rows=ROWS)
        kind = stream.next().reply.failure.code

        def told_of() -> list[dict[str, Any]]:
            return [line for line in json_lines(watched.server) if line.get("microbatch") == 9]

        wait_until(lambda: bool(told_of()), "the log's line")
        (line,) = told_of()
    told = {name: line[name] for name in ("level", "session", "pass", "error")}
    assert told == {"level": "INFO", "session": "asks-wrongly", "pass": "backward", "error": kind}
    assert line["message"].startswith(f"session asks-wrongly: backward of microbatch 9 refused ({kind}): ")


@pytest.fixture
def levels() -> Iterator[None]:
    """Levels of loggers are as they were, afterwards."""
    before = {name: logging.getLogger(name).level for name in OURS}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(
    ("level", "told"), [("debug", ["DEBUG", "INFO"]), ("info", ["INFO"]), ("warning", [])], ids=lambda each: str(each)
)
@pytest.mark.usefixtures("levels")
def test_a_level_is_of_our_own_lines_alone(
    level: Literal["debug", "info", "warning"], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    of_all, of_library = logging.getLogger().level, logging.getLogger("transformers").level
    logs.configure("text", level)
    assert {logging.getLogger(name).level for name in OURS} == {getattr(logging, level.upper())}
    assert (logging.getLogger().level, logging.getLogger("transformers").level) == (of_all, of_library)
    seen, call = Watch().of(SESSION), pb.Call(key=pb.Key(microbatch=3, pass_kind=pb.PASS_FORWARD), step=2)
    seen.answered(call, 0.25)
    seen.refused(call, LimitError("too\nmany"))
    assert [record.levelname for record in caplog.records] == told
    lines = ["session of-someone: forward of microbatch 3 answered in 0.2500 s"]
    lines += ["session of-someone: forward of microbatch 3 refused (limit): too many"]
    assert caplog.messages == lines[len(lines) - len(told) :]


def test_answers_name_the_step_that_the_edge_is_at_and_none_while_it_scores(
    tiny_models: dict[str, Path], rows: Path, cache: Path, tmp_path: Path
) -> None:
    flags = ("--cut", "1:1", "--log-format", "json", "--log-level", "debug")
    with serving(tiny_models["llama"], *flags, cache=cache, GRPC_VERBOSITY="NONE") as server:
        run_here(settings(server, rows, steps=2, microbatches=2, eval_data=rows), tmp_path / "run")
        answered = [line for line in json_lines(server) if line["level"] == "DEBUG" and "microbatch" in line]
    steps = [line.get("step") for line in answered]
    assert steps.count(1) == steps.count(2) == 4  # two microbatches, forward and backward
    scoring = [line["pass"] for line in answered if "step" not in line]
    assert set(scoring) == {"forward"}
    assert len(answered) == 8 + len(scoring)


def test_another_level_is_refused() -> None:
    with pytest.raises(UsageError, match=r"log.level"):
        read_settings(ServeConfig, None, {"model": "m", "log_level": "trace"})


def test_strangers_at_the_port_leave_only_objects_too(watched: Watched) -> None:
    host, _, port = watched.server.address.rpartition(":")
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, int(port)), 20) as line:
        line.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with (
        suppress(OSError),  # a stranger without a certificate is refused
        socket.create_connection((host, int(port)), 20) as line,
        anyone.wrap_socket(line) as secured,
    ):
        secured.recv(1)
    assert json_lines(watched.server)


def test_an_edge_that_vanishes_is_no_error(watched: Watched) -> None:
    streams = watched.status.figures()["sessions"]["streams"]
    with wire(watched.server.address, watched.identity("alice"), "vanishes") as stream:
        assert stream.next().HasField("opened")
        stream.call(1, pb.PASS_FORWARD, torch.ones(ROWS.tokens, WIDTH), rows=ROWS)
        stream._call.cancel()
    wait_until(lambda: watched.status.figures()["sessions"]["streams"] == streams, "the stream to end")
    assert not [line for line in json_lines(watched.server) if line["level"] == "ERROR"]


def test_text_is_as_it_was(servers: dict[str, Server]) -> None:
    with wire(servers["llama"].address, None, "plain-text") as stream:
        assert stream.next().HasField("opened")
    (line,) = (line for line in servers["llama"].lines if "session plain-text opened" in line)
    day, clock, level, logger, message = line.split(maxsplit=4)
    assert (len(day), len(clock), level, logger) == (10, 12, "INFO", "cloud_node.service:")
    assert message == "session plain-text opened by anonymous at cut 1:1\n"


def test_what_fails_unexpectedly_is_logged_with_its_request_and_told_without_reasons(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch, session = Watch(), Session("broken", "someone", Cut(1, 1), "none", "none", False, (), "")
    call = pb.Call(key=pb.Key(microbatch=7, pass_kind=pb.PASS_BACKWARD), step=4)
    watch.of(session).broken(RuntimeError("of the device"), call)
    (record,) = caplog.records
    line = json.loads(JsonLines().format(record))
    assert {name: line[name] for name in ("level", "session", "tenant", "step", "microbatch", "pass", "error")} == {
        "level": "ERROR",
        "session": "broken",
        "tenant": "someone",
        "step": 4,
        "microbatch": 7,
        "pass": "backward",
        "error": "internal",
    }
    assert "RuntimeError: of the device" in line["traceback"]
    assert watch.requests["backward", "failed"] == watch.errors["internal"] == 1


def test_a_failure_while_a_stream_is_read_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    class BrokenEngine:
        def describe(self) -> SimpleNamespace:
            return SimpleNamespace(linears={})

        def release(self, *_: object) -> None:
            raise RuntimeError("of the engine")

    async def talk() -> list[pb.ServerFrame]:
        session = Session("broken", "someone", Cut(1, 1), "none", "none", False, (), "")
        with ThreadPoolExecutor(1) as pool:
            stream = SessionStream(session, cast(Engine, BrokenEngine()), Limits(), pool)

            async def frames() -> AsyncIterator[pb.ClientFrame]:
                yield pb.ClientFrame(release=pb.Release())

            await stream.read(frames())
            return [frame async for frame in stream.write() if isinstance(frame, pb.ServerFrame)]

    told = asyncio.run(asyncio.wait_for(talk(), 20))
    assert [frame.failure.code for frame in told if frame.HasField("failure")] == ["internal"]
    assert "of the engine" not in str(told)
    assert "RuntimeError: of the engine" in caplog.text
