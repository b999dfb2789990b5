"""A thousand sessions of every kind, some broken off: a node is afterwards what it was, in memory and in handles."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_client.server import describe
from edge_client.stream import open_channel
from isthmus import PROTOCOL
from isthmus.ledger.record import Ledger
from isthmus.ports import LORA, Port
from isthmus.rows import Rows
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from tests.faults.frames import Wire
from tests.faults.training import wait_until
from tests.kills.disturbed import Place
from tests.kills.forked import Forked

FIRST, ALL = 200, 1000
GROWTH_BYTES = 8 << 20
"""Of resident memory, from the first sessions to the last: a leak of 10 kB a session would show."""

WIDTH, ROWS = 32, Rows((6, 4), (0, 0))
KINDS = ("training", "forward only", "decoding", "ports", "opened only", "cancelled", "half a request")
BROKEN_OFF = ("ports", "cancelled", "half a request")


@pytest.fixture
def node(place: Place, tmp_path: Path) -> Iterator[Forked]:
    (tmp_path / "tmp").mkdir()
    server = place.forking.start(
        *("cloud_node", "serve", "--model", place.model, "--cut", "1:1", "--listen", "127.0.0.1:0", "--threads", "1"),
        *("--submissions", tmp_path / "in"),
        ISTHMUS_CACHE=str(place.nodes),
        TMPDIR=str(tmp_path / "tmp"),
    )
    yield server
    server.kill()


class Sessions:
    """Opens and ends sessions on one channel."""

    def __init__(self, stub: pb_grpc.BackboneStub, digest: str) -> None:
        self._stub, self._digest = stub, digest
        self._hidden_ND = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))

    def one(self, number: int) -> None:
        """A session of the kind whose turn it is; one that is broken off is found again and ended."""
        kind = KINDS[number % len(KINDS)]
        wire = self._opened(number, kind)
        self._use(wire, kind)
        if kind in BROKEN_OFF:
            wire.cancel()
            wire = self._opened(number, kind)
        wire.end()
        list(wire)

    def _opened(self, number: int, kind: str) -> Wire:
        wire = Wire(self._stub)
        codecs = {"codec_activation": "none", "codec_gradient": "none"}
        more: dict[str, Any] = {"forward_only": True} if kind == "forward only" else {}
        if kind == "ports":
            more = {"ports": [Port(1, module="self_attn.q_proj", kind=LORA).to_wire()], "codec_port": "none"}
        opening = {"session": f"session-{number}", "model_digest": self._digest, **codecs, **more}
        wire.send(open=pb.Open(protocol=PROTOCOL, bottom=1, top=1, **opening))
        assert wire.next().HasField("opened")
        return wire

    def _use(self, wire: Wire, kind: str) -> None:
        hidden_ND = self._hidden_ND
        if kind in ("training", "cancelled"):
            wire.call(1, pb.PASS_FORWARD, hidden_ND, rows=ROWS, keep=True)
            assert wire.answer()[0].kept
        if kind == "training":
            wire.call(1, pb.PASS_BACKWARD, torch.ones(10, WIDTH))
            assert not wire.answer()[0].HasField("failure")
        if kind in ("forward only", "decoding"):
            which = pb.PASS_DECODE if kind == "decoding" else pb.PASS_FORWARD
            wire.call(1, which, hidden_ND, rows=ROWS)
            wire.answer()
        if kind == "ports":
            wire.call(1, pb.PASS_FORWARD, hidden_ND, rows=ROWS, keep=True)
            wire.next()  # the question, to which there is never an answer
        if kind == "half a request":
            header = pb.Tensor(dtype="float32", shape=[10, WIDTH], codec="none", size=10 * WIDTH * 4)
            key = pb.Key(microbatch=1, pass_kind=pb.PASS_FORWARD)
            wire.send(call=pb.Call(key=key, tensors=[header], rows=ROWS.to_wire()))


def held(pid: int, folder: Path) -> dict[str, int]:
    """What a process has now: threads, descriptors, temporary files."""
    process = Path(f"/proc/{pid}")
    return {
        "threads": len(list((process / "task").iterdir())),
        "descriptors": len(list((process / "fd").iterdir())),
        "files": sum(1 for _ in folder.rglob("*")),
    }


def closed(log: str) -> int:
    """Sessions of which a node's log has last that they were closed."""
    last = dict(re.findall(r": session (\S+) .*?(opened|closed)", log))
    return list(last.values()).count("closed")


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_sessions_leave_nothing_behind(node: Forked, tmp_path: Path) -> None:
    digest = describe(node.address, None, Ledger()).model_digest
    with open_channel(node.address, None) as channel:
        sessions = Sessions(pb_grpc.BackboneStub(channel), digest)

        def go_on(begin: int, end: int) -> tuple[dict[str, int], int]:
            for number in range(begin, end):
                sessions.one(number)
            wait_until(lambda: closed(node.said) == end, "the node to close all of them")
            return held(node.pid, tmp_path / "tmp"), resident_bytes(node.pid)

        first, before = go_on(0, FIRST)
        last, after = go_on(FIRST, ALL)
    sys.stdout.write(f"{before} bytes resident after {FIRST} sessions, {after} after {ALL}; {first}, {last}\n")
    assert last["files"] == first["files"] == 0
    assert last["threads"] <= first["threads"]
    assert last["descriptors"] <= first["descriptors"]
    assert after - before < GROWTH_BYTES, f"{before} bytes grew to {after}"
    node.signal(signal.SIGTERM)
    assert node.wait() == 0, node.said
    assert "Traceback" not in node.said, node.said
