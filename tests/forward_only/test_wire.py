"""What crosses the wire when everything that trains lies above the span, read from a recording of all of it."""

from pathlib import Path

import pytest

from isthmus.ports import Port
from isthmus.training.data import read_examples
from isthmus.training.scoring import queries
from isthmus.wire.gen import backbone_pb2 as pb
from tests.faults.training import as_flags
from tests.forward_only.edges import SIDE, command, run_settings
from tests.forward_only.recorder import Recording, recording
from tests.harness import Server, byte_tokenizer
from tests.parity.reference import HIDDEN

FLOAT = 4


def recorded(server: Server, way: str, rows: Path, held_out: Path, place: Path, **changes: object) -> Recording:
    """A run of two epochs by the command line, with a recorder in its line."""
    with recording(server.address) as between:
        given = {"epochs": 2, "eval_data": held_out, "sample": "good:", **changes}
        config = run_settings(way, between.address, rows, place / "kept", **given)
        done = command("train", *as_flags(config), "--out", place / "run")
        assert done.code == 0, done.err
    return between


def openings(between: Recording) -> list[pb.Open]:
    return [frame.open for frame in between.client_frames() if frame.HasField("open")]


def inputs(rows: Path, held_out: Path) -> set[tuple[int, ...]]:
    """Each distinct input of training and scoring: all of a row but its last token."""
    tokenizer = byte_tokenizer()
    train, held = (read_examples(path, tokenizer, 512).examples for path in (rows, held_out))
    sequences = [example.train for example in train] + [query.sequence for query in queries(held)]
    return {sequence.ids[:-1] for sequence in sequences}


def chunk_bytes(frames: list[pb.ClientFrame] | list[pb.ServerFrame], keys: set[tuple[int, int]]) -> int:
    """Bytes of the chunks that belong to these requests."""
    chunks = [frame.chunk for frame in frames if frame.HasField("chunk")]
    return sum(len(chunk.data) for chunk in chunks if (chunk.key.microbatch, chunk.key.pass_kind) in keys)


@pytest.fixture
def doubled(rows: Path, tmp_path: Path) -> Path:
    """The training rows with some of them twice."""
    lines = rows.read_text().splitlines(keepends=True)
    (tmp_path / "doubled.jsonl").write_text("".join([*lines, *lines[:5]]))
    return tmp_path / "doubled.jsonl"


@pytest.mark.parametrize("way", ["top", "side"])
def test_no_backward_and_no_gradient_crosses_and_each_distinct_token_is_sent_once(
    nodes: dict[str, Server], doubled: Path, held_out: Path, tmp_path: Path, way: str
) -> None:
    between = recorded(nodes["llama"], way, doubled, held_out, tmp_path, sample=None)
    calls, up, down = between.calls(), between.client_frames(), between.server_frames()
    assert [opening.forward_only for opening in openings(between)] == [True]
    assert {call.key.pass_kind for call in calls} == {pb.PASS_FORWARD}
    assert not any(call.keep for call in calls)
    assert not any(frame.reply.kept for frame in down if frame.HasField("reply"))
    assert {len(call.tensors) for call in calls} == {1}
    keys = {(call.key.microbatch, int(call.key.pass_kind)) for call in calls}
    assert len(keys) == len(calls), "nothing was sent a second time"

    tokens = sum(map(len, inputs(doubled, held_out)))
    assert sum(sum(call.rows.row_lengths) for call in calls) == tokens
    assert sum(call.tensors[0].shape[0] for call in calls) == tokens
    assert chunk_bytes(up, keys) == FLOAT * HIDDEN * tokens
    assert sum(len(frame.chunk.data) for frame in up if frame.HasField("chunk")) == FLOAT * HIDDEN * tokens

    ports = [Port(port.block, port.width) for port in openings(between)[0].ports]
    assert ports == ([] if way == "top" else [Port(2, SIDE["tap_width"])])
    answered = HIDDEN + sum(port.width for port in ports)
    assert sum(len(frame.chunk.data) for frame in down if frame.HasField("chunk")) == FLOAT * answered * tokens


@pytest.mark.parametrize("way", ["top", "side"])
def test_a_sample_after_training_crosses_forward_and_decode_alone(
    nodes: dict[str, Server], rows: Path, held_out: Path, tmp_path: Path, way: str
) -> None:
    calls = recorded(nodes["llama"], way, rows, held_out, tmp_path).calls()
    kinds = {call.key.pass_kind for call in calls}
    assert kinds == ({pb.PASS_FORWARD, pb.PASS_DECODE} if way == "top" else {pb.PASS_FORWARD})
    assert not any(call.keep for call in calls)


def test_the_same_recording_of_a_run_that_trains_both_ends_shows_its_backwards(
    nodes: dict[str, Server], rows: Path, held_out: Path, tmp_path: Path
) -> None:
    between = recorded(nodes["llama"], "top", rows, held_out, tmp_path, train="both", sample=None, cache=None)
    calls = between.calls()
    assert [opening.forward_only for opening in openings(between)] == [False]
    backwards = [call for call in calls if call.key.pass_kind == pb.PASS_BACKWARD]
    assert len(backwards) == 2 * 3
    assert sum(call.keep for call in calls) == len(backwards)
    assert any(frame.reply.kept for frame in between.server_frames() if frame.HasField("reply"))
    keys = {(call.key.microbatch, int(call.key.pass_kind)) for call in backwards}
    assert chunk_bytes(between.client_frames(), keys) > 0
