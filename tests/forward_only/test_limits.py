"""What a session that only runs forward may ask at once, and that an edge never asks for more."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cloud_node.calls import ROWS_APART, Limits
from cloud_node.engine import Opening
from cloud_node.exchange import SessionStream
from cloud_node.in_process import InProcessEngine
from cloud_node.loading import load_spans
from cloud_node.session import Session
from edge_client.cache import Origin, OutputCache
from edge_client.cached import LONGEST_ANSWER, Below, Output, Outputs, Row
from edge_client.passes import RemoteBackbone
from edge_client.pending import Received
from edge_client.runs import RunDirectory
from isthmus.cut import Cut
from isthmus.errors import LimitError, UsageError, WireError
from isthmus.ledger.record import Ledger
from isthmus.ports import MAX_TIMES_HIDDEN, MAX_WIDTH, Port, check_ports
from isthmus.rows import Rows
from isthmus.wire.frames import Chunk, read_client_frame
from isthmus.wire.gen import backbone_pb2 as pb
from tests.bad_input.raw import Client, describe, hidden, request
from tests.faults.training import as_flags
from tests.forward_only.edges import command, run_settings
from tests.forward_only.test_refusals import is_one_line, opened_with, refusal
from tests.harness import Server
from tests.parity.reference import BLOCKS, HIDDEN, connected

EVERYWHERE = [Port(number, HIDDEN) for number in range(BLOCKS)]

# Taps


def test_taps_are_together_at_most_so_many_times_the_hidden_size() -> None:
    check_ports(EVERYWHERE[:MAX_TIMES_HIDDEN], Cut(0, 0), BLOCKS, HIDDEN, ())
    with pytest.raises(LimitError, match="fewer or narrower"):
        check_ports([*EVERYWHERE[:MAX_TIMES_HIDDEN], Port(BLOCKS - 1, 1)], Cut(0, 0), BLOCKS, HIDDEN, ())


def test_a_tap_is_never_wider_than_its_projection_is_made_for() -> None:
    check_ports([Port(2, MAX_WIDTH)], Cut(0, 0), BLOCKS, 4 * MAX_WIDTH, ())
    with pytest.raises(WireError, match=f"outside 1 to {MAX_WIDTH}"):
        check_ports([Port(2, MAX_WIDTH + 1)], Cut(0, 0), BLOCKS, 4 * MAX_WIDTH, ())


def test_taps_that_are_too_wide_together_are_refused_when_a_session_opens(nodes: dict[str, Server]) -> None:
    card = describe(nodes["llama"].address, None)
    failure = refusal(nodes["llama"], opened_with(card, EVERYWHERE, bottom=0, top=0))
    assert failure.code == "limit", failure
    assert is_one_line(failure)
    most = opened_with(card, EVERYWHERE[:MAX_TIMES_HIDDEN], bottom=0, top=0)
    with Client(nodes["llama"].address, None, most) as client:
        assert not client.ask(*request(1, [hidden(5, 3)], rows=(5, 3))).code


@pytest.mark.parametrize("codec", ["none", "int8", "zstd"])
def test_a_codec_for_ports_without_ports_is_refused_when_a_session_opens(nodes: dict[str, Server], codec: str) -> None:
    card = describe(nodes["llama"].address, None)
    failure = refusal(nodes["llama"], opened_with(card, [], codec_port=codec))
    assert failure.code == "usage", failure
    assert "goes with ports" in failure.message
    assert is_one_line(failure)


# Rows


def test_more_rows_apart_than_one_message_can_head_are_refused_and_the_session_goes_on(
    nodes: dict[str, Server],
) -> None:
    card, rows = describe(nodes["llama"].address, None), (1,) * (ROWS_APART + 1)
    with Client(nodes["llama"].address, None, opened_with(card, [], codec_port="")) as client:
        answer = client.ask(*request(1, [hidden(*rows)], rows=rows, apart=True))
        assert answer.code == "limit", answer.reply
        assert is_one_line(answer.reply.failure)
        assert not client.ask(*request(2, [hidden(*rows)], rows=rows)).code, "together they may cross"


class Conversation:
    """A stream of a session in this process, which is read frame by frame."""

    def __init__(self, stream: SessionStream) -> None:
        self._frames: asyncio.Queue[pb.ClientFrame] = asyncio.Queue()
        self._written = stream.write()
        self._reading = asyncio.ensure_future(stream.read(self._sent()))

    async def _sent(self) -> AsyncIterator[pb.ClientFrame | Chunk]:
        while True:
            yield read_client_frame((await self._frames.get()).SerializeToString())
            self._frames.task_done()

    async def send(self, frames: Sequence[pb.ClientFrame]) -> None:
        """Send frames, and wait until the server has taken each in."""
        for frame in frames:
            self._frames.put_nowait(frame)
        await self._frames.join()

    async def next(self) -> pb.ServerFrame | Chunk:
        return await anext(self._written)

    async def reply(self) -> pb.Reply:
        """The next answer, whose chunks are still to be read."""
        frame = await self.next()
        assert isinstance(frame, pb.ServerFrame), frame
        assert frame.HasField("reply"), frame
        return frame.reply

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._written.aclose()  # type: ignore[attr-defined]


def converse(
    directory: Path, limits: Limits, ports: tuple[Port, ...], talk: Callable[[Conversation], Awaitable[None]]
) -> None:
    """Talk with a session of cut 0:0 that has these limits."""
    cut = Cut(0, 0)
    engine = InProcessEngine(load_spans(directory, [cut], torch.float32, torch.device("cpu")), "cpu", HIDDEN, 0)
    engine.open("s", Opening(cut, tuple(ports)))
    session = Session("s", "someone", cut, "none", "none", True, ports, "none" if ports else "")

    async def hold() -> None:
        with ThreadPoolExecutor(1) as pool:
            conversation = Conversation(SessionStream(session, engine, limits, pool))
            opened = await conversation.next()
            assert isinstance(opened, pb.ServerFrame)
            assert opened.HasField("opened")
            await talk(conversation)
            await conversation.close()

    asyncio.run(asyncio.wait_for(hold(), 60))


def test_taps_of_rows_that_padding_makes_too_large_are_refused_and_the_session_goes_on(
    tiny_models: dict[str, Path],
) -> None:
    ports = tuple(EVERYWHERE[:MAX_TIMES_HIDDEN])
    of_position = 4 * HIDDEN * MAX_TIMES_HIDDEN
    limits = Limits(call_bytes=30 * of_position)

    async def talk(conversation: Conversation) -> None:
        await conversation.send(request(1, [hidden(16, 1)], rows=(16, 1)))
        refused = (await conversation.reply()).failure
        assert refused.code == "limit", refused
        assert is_one_line(refused)
        assert str(32 * of_position) in refused.message
        await conversation.send(request(2, [hidden(15, 1)], rows=(15, 1)))
        answered = await conversation.reply()
        assert not answered.failure.code, answered
        assert sum(header.size for header in answered.tensors) == 16 * (of_position + 4 * HIDDEN)

    converse(tiny_models["llama"], limits, ports, talk)


def test_an_answers_bytes_count_as_unanswered_until_its_last_frame_has_left(tiny_models: dict[str, Path]) -> None:
    size = 4 * HIDDEN * 8
    limits = Limits(call_bytes=size * 3 // 2)

    async def talk(conversation: Conversation) -> None:
        await conversation.send(request(1, [hidden(8)], rows=(8,)))
        assert (await conversation.reply()).key.microbatch == 1
        await conversation.send(request(2, [hidden(8)], rows=(8,)))
        early = await conversation.reply()
        assert (early.key.microbatch, early.failure.code) == (2, "limit")
        assert "unanswered" in early.failure.message
        assert isinstance(await conversation.next(), Chunk)
        await conversation.send(request(3, [hidden(8)], rows=(8,)))
        late = await conversation.reply()
        assert (late.key.microbatch, late.failure.code) == (3, "")

    converse(tiny_models["llama"], limits, (), talk)


def test_one_request_sent_again_and_again_counts_each_time(tiny_models: dict[str, Path]) -> None:
    limits = Limits(call_bytes=4 * HIDDEN * 8 * 5 // 2)

    async def talk(conversation: Conversation) -> None:
        for _ in range(3):
            await conversation.send(request(1, [hidden(8)], rows=(8,)))
        frames = [await conversation.next() for _ in range(3)]  # two answers' headers come, and one refusal
        replies = [frame.reply for frame in frames if isinstance(frame, pb.ServerFrame)]
        assert [reply.failure.code for reply in replies].count("limit") == 1

    converse(tiny_models["llama"], limits, (), talk)


# The edge keeps within them


class Noted(RemoteBackbone):
    """Notes the lengths of the rows that each request asks for."""

    def __init__(self, remote: RemoteBackbone) -> None:
        super().__init__(remote._link, remote._ledger, "none", "none")
        self.asked: list[tuple[int, ...]] = []

    def ask_apart(self, hidden_ND: torch.Tensor, rows: Rows, widths: tuple[int, ...]) -> "Future[Received]":
        self.asked.append(rows.lengths)
        return super().ask_apart(hidden_ND, rows, widths)


def test_an_edge_splits_its_requests_so_that_no_answer_padded_is_too_large(
    nodes: dict[str, Server], tmp_path: Path
) -> None:
    lengths = (3, 3, 9, 2, 2, 2, 20, 1, 1, 4)
    rows = [Row(tuple(range(number, number + length))) for number, length in enumerate(lengths, start=3)]
    most = 10 * 4 * HIDDEN

    def answers(remote: RemoteBackbone, below: Below, name: str, answer_bytes: int) -> list[Output]:
        origin = Origin("", "", "", "", "", "", (), False, "", "")
        cache = OutputCache(tmp_path / name, 1 << 30, origin)
        return Outputs(below, remote, cache, Ledger(), (HIDDEN,), answer_bytes, alone=False).of(rows)

    with connected(nodes["llama"], "1:2", train="top", cache=tmp_path / "unused") as edge:
        assert edge.remote is not None
        below = edge.cached_outputs()._below
        split, whole = Noted(edge.remote), Noted(edge.remote)
        apart = answers(split, below, "split", most)
        whole._ids = split._ids  # of one session
        together = answers(whole, below, "whole", 1 << 28)
    assert whole.asked == [lengths]
    assert [length for asked in split.asked for length in asked] == list(lengths)
    assert all(len(asked) == 1 or len(asked) * max(asked) * 4 * HIDDEN <= most for asked in split.asked)
    assert split.asked == [(3, 3), (9,), (2, 2, 2), (20,), (1, 1), (4,)]
    for (one,), (other,) in zip(apart, together, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_an_edge_asks_for_fewer_rows_apart_than_a_server_answers(
    nodes: dict[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LONGEST_ANSWER <= ROWS_APART
    monkeypatch.setattr("edge_client.cached.LONGEST_ANSWER", 4)
    rows = [Row((number, 5)) for number in range(3, 13)]
    ledger = Ledger()
    with connected(nodes["llama"], "1:2", ledger, train="top", cache=tmp_path) as edge:
        edge.cached_outputs().of(rows)
    assert ledger.total("train", "round_trips") == 3


# What makes no sense is said in one line

NO_SENSE: dict[str, tuple[tuple[str, ...], str]] = {
    "a codec for gradients that never cross": (("--train", "top", "--codec-gradient", "none"), "--codec-gradient"),
    "outputs kept that change": (("--train", "both", "--cache", "kept"), "--cache"),
    "a limit that is no size": (("--train", "top", "--cache-limit", "lots"), "--cache-limit"),
}


@pytest.mark.parametrize("case", NO_SENSE)
def test_flags_that_contradict_what_trains_are_refused_in_one_line(case: str, rows: Path, tmp_path: Path) -> None:
    flags, named = NO_SENSE[case]
    given = ("--method", "split", "--server", "127.0.0.1:1", "--data", rows, "--out", tmp_path / "run")
    done = command("train", *given, *flags)
    assert done.code == UsageError.exit_code, done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert named in done.err


def test_a_limit_is_understood_with_its_unit(nodes: dict[str, Server], rows: Path, tmp_path: Path) -> None:
    flags = as_flags(run_settings("top", nodes["llama"].address, rows, tmp_path / "kept", steps=1))
    done = command("train", *flags, "--cache-limit", "2MB", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert RunDirectory(tmp_path / "run").config().cache_limit == 2_000_000
