"""A server that is asked to stop finishes what it has begun, says so, and takes nothing new."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from isthmus.rows import Rows
from isthmus.wire.gen import backbone_pb2 as pb
from tests.faults.conftest import Adapter
from tests.faults.frames import wire
from tests.faults.training import Background, adapter, port_of, same_bits, settings
from tests.harness import serving

CALLS = 24
ROWS = Rows((200,) * 40, (0,) * 40)
WIDTH = 32


@dataclass
class Drained:
    """What clients saw of a server that was told to stop with requests under way."""

    frames: list[pb.ServerFrame]
    newcomer: list[pb.ServerFrame]
    exit_code: int
    log: str

    def kinds(self) -> list[str]:
        return [str(frame.WhichOneof("body")) for frame in self.frames]


@pytest.fixture(scope="module")
def drained(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Drained:
    """SIGTERM comes when the server has read every request and answered few; a newcomer when it has said so."""
    frames, newcomer = [], []
    hidden_ND = torch.randn(ROWS.tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    with (
        serving(tiny_models["llama"], "--cut", "1:1", cache=tmp_path_factory.mktemp("drained")) as server,
        wire(server.address, None, "busy") as busy,
    ):
        for number in range(1, CALLS + 1):
            busy.call(number, pb.PASS_FORWARD, hidden_ND, rows=ROWS)
        busy.send(heartbeat=pb.Heartbeat(nonce=1))  # answered once everything before it was read
        for frame in busy:
            frames.append(frame)
            if frame.HasField("heartbeat"):
                server.process.send_signal(signal.SIGTERM)
            if frame.HasField("drain"):
                with wire(server.address, None, "newcomer") as late:
                    newcomer.extend(late)
        return Drained(frames, newcomer, server.process.wait(30), server.log)


def test_the_client_is_told_while_its_requests_are_under_way(drained: Drained) -> None:
    assert drained.frames[drained.kinds().index("drain")].drain.reason
    assert "reply" in drained.kinds()[drained.kinds().index("drain") :]


def test_every_request_that_was_under_way_is_answered_in_full(drained: Drained) -> None:
    replies = [frame.reply for frame in drained.frames if frame.HasField("reply")]
    assert not any(reply.HasField("failure") for reply in replies)
    assert sorted(reply.key.microbatch for reply in replies) == list(range(1, CALLS + 1))
    received = sum(len(frame.chunk.data) for frame in drained.frames if frame.HasField("chunk"))
    assert received == CALLS * ROWS.tokens * WIDTH * 4
    assert drained.kinds()[-1] == "chunk"  # and then the stream ends without an error


def test_a_new_session_is_refused_meanwhile(drained: Drained) -> None:
    assert [frame.failure.code for frame in drained.newcomer] == ["draining"]


def test_the_server_then_exits_in_good_order(drained: Drained) -> None:
    assert drained.exit_code == 0
    assert drained.log.endswith("cloud_node: stopped\n")
    assert "Traceback" not in drained.log


def test_a_run_survives_a_drain_and_a_restart_and_an_idle_session_does_not_keep_the_server(
    tiny_models: dict[str, Path],
    rows: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Adapter],
) -> None:
    with (
        serving(tiny_models["llama"], "--cut", "1:1", cache=tmp_path) as server,
        wire(server.address, None, "idle") as idle,
    ):
        assert idle.next().HasField("opened")
        run = Background(settings(server, rows, microbatches=4), tmp_path / "run", monkeypatch)
        run.reaches(3)
        assert server.stop() == 0
        assert [frame.WhichOneof("body") for frame in idle] == ["drain"]
        run.must_go_on()
    with serving(tiny_models["llama"], "--cut", "1:1", cache=tmp_path, port=port_of(server)):
        assert run.result().status == "complete"
    assert same_bits(adapter(run.out), undisturbed(microbatches=4))
