"""Frames that no honest edge sends: each is named in an answer of its own, and costs nobody else anything."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
import xxhash

from isthmus.trust.credentials import Credentials
from isthmus.wire.chunks import MAX_TENSORS
from isthmus.wire.gen import backbone_pb2 as pb
from tests.bad_input.raw import HIDDEN, Client, RawStream, hidden, identity, opening, request
from tests.harness import Server

MAY_GROW = 64 << 20
ROWS = (5, 3)

Connect = Callable[..., Client]


@pytest.fixture(scope="module")
def credentials(owner: Path) -> Credentials:
    return identity(owner, "frames")


@pytest.fixture(scope="module")
def connect(guarded: Server, credentials: Credentials, card: pb.ModelCard) -> Connect:
    """Open a session of a name of its own."""
    names = itertools.count()

    def open_session(**changes: object) -> Client:
        return Client(guarded.address, credentials, opening(card, f"frames-{next(names)}", **changes))

    return open_session


@pytest.fixture(scope="module")
def expected(connect: Connect) -> torch.Tensor:
    """What the server answers to a correct forward, whatever else it has been sent."""
    with connect() as client:
        return client.ask(*request(1, [hidden(*ROWS)], rows=ROWS)).tensor.clone()


@pytest.fixture(scope="module", autouse=True)
def no_growth(guarded: Server, expected: torch.Tensor) -> Iterator[None]:
    """All of this file's tests together leave the server's memory where it was."""
    before = resident_bytes(guarded)
    yield
    assert resident_bytes(guarded) - before < MAY_GROW


def resident_bytes(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def answers_as_ever(client: Client, expected: torch.Tensor, microbatch: int = 1 << 40) -> None:
    answer = client.ask(*request(microbatch, [hidden(*ROWS)], rows=ROWS))
    assert torch.equal(answer.tensor, expected)


def forged(
    data: bytes = b"\0" * 4 * HIDDEN * 8, rows: pb.Rows | None = None, microbatch: int = 1, **header: object
) -> list[pb.ClientFrame]:
    """A forward whose header claims whatever the test says, and as many chunks as `data` needs."""
    claimed = {"dtype": "float32", "shape": [8, HIDDEN], "codec": "none", "size": len(data), **header}
    key = pb.Key(microbatch=microbatch, pass_kind=pb.PASS_FORWARD)
    if "checksum" not in header:
        claimed["checksum"] = xxhash.xxh3_64_intdigest(data)
    call = pb.Call(key=key, tensors=[pb.Tensor(**claimed)], rows=rows or pb.Rows(row_lengths=ROWS))  # type: ignore[arg-type]
    chunk = pb.Chunk(key=key, offset=0, data=data)
    return [pb.ClientFrame(call=call), *([pb.ClientFrame(chunk=chunk)] if data else [])]


def spoiled(value: float, dtype: torch.dtype = torch.float32) -> bytes:
    values = hidden(*ROWS)
    values[4, 7] = value
    return values.to(dtype).view(torch.uint8).numpy().tobytes()


def with_rows(**fields: object) -> list[pb.ClientFrame]:
    return forged(rows=pb.Rows(**fields))  # type: ignore[arg-type]


SCALES_OF_NAN = bytes(8 * HIDDEN) + np.full(4, 0x7FC0, np.uint16).tobytes()

REFUSED = {
    "another hidden size": (lambda: request(1, [torch.zeros(8, HIDDEN + 1)], rows=ROWS), "wire"),
    "one dimension": (lambda: request(1, [torch.zeros(8)], rows=ROWS), "wire"),
    "three dimensions": (lambda: request(1, [torch.zeros(2, 4, HIDDEN)], rows=ROWS), "wire"),
    "integers": (lambda: request(1, [torch.zeros(8, HIDDEN, dtype=torch.int64)], rows=ROWS), "wire"),
    "an unknown dtype": (lambda: forged(dtype="complex128"), "wire"),
    "a declared size that is too small": (lambda: forged(size=8), "wire"),
    "a declared size that is too large": (lambda: forged(size=1 << 60), "wire"),
    "a wrong checksum": (lambda: forged(checksum=1), "wire"),
    "NaN": (lambda: forged(spoiled(float("nan"))), "wire"),
    "infinity": (lambda: forged(spoiled(float("inf"))), "wire"),
    "NaN in bfloat16": (lambda: forged(spoiled(float("nan"), torch.bfloat16), codec="bf16"), "wire"),
    "NaN as the scale of int8": (lambda: forged(SCALES_OF_NAN, codec="int8"), "wire"),
    "an unknown codec": (lambda: forged(codec="zstd"), "wire"),
    "2**63 tokens": (lambda: forged(shape=[2**63, HIDDEN], size=2**64 - 1), "limit"),
    "2**63 wide": (lambda: forged(shape=[8, 2**63]), "wire"),
    "2**63 tokens of no width": (lambda: forged(b"", shape=[2**63, 0]), "wire"),
    "sizes whose product overflows": (lambda: forged(b"", shape=[2**33, 2**33], size=0), "wire"),
    "a million dimensions": (lambda: forged(shape=[1] * 1_000_000), "wire"),
    "no tensor": (lambda: request(1, [], rows=ROWS), "wire"),
    "two tensors": (lambda: request(1, [hidden(8), hidden(8)], rows=ROWS), "wire"),
    "more tensors than any message has": (lambda: request(1, [hidden(8)] * (MAX_TENSORS + 1), rows=ROWS), "wire"),
    "fewer rows than tokens": (lambda: request(1, [hidden(8)], rows=[5]), "wire"),
    "more rows than tokens": (lambda: request(1, [hidden(8)], rows=[5, 4]), "wire"),
    "no rows": (lambda: request(1, [hidden(8)], rows=[]), "wire"),
    "no tokens": (lambda: request(1, [torch.zeros(0, HIDDEN)], rows=[]), "wire"),
    "an empty row": (lambda: request(1, [hidden(8)], rows=[8, 0]), "wire"),
    "rows of 2**32 tokens": (lambda: request(1, [hidden(8)], rows=[2**32 - 1] * 8), "wire"),
    "a million empty rows": (lambda: with_rows(row_lengths=[0] * 1_000_000), "wire"),
    "fewer starts than rows": (lambda: with_rows(row_lengths=ROWS, starts=[1]), "wire"),
    "a start beyond any position": (lambda: with_rows(row_lengths=ROWS, starts=[0, 2**32 - 1]), "wire"),
    "a start beyond the limit": (lambda: with_rows(row_lengths=ROWS, starts=[0, 252]), "limit"),
    "a row beyond the limit": (lambda: request(1, [hidden(257)], rows=[257]), "limit"),
    "a bitmap that is too long": (lambda: with_rows(row_lengths=ROWS, wanted=b"\1\0"), "wire"),
    "a bitmap of tokens that are not there": (lambda: short(wanted=b"\xff"), "wire"),
    "more tokens than a request may have": (
        lambda: forged(shape=[(1 << 17) + 1, HIDDEN], size=4 * HIDDEN * ((1 << 17) + 1)),
        "limit",
    ),
    "a pass that does not exist": (lambda: request(1, [hidden(8)], 99, ROWS), "wire"),  # type: ignore[arg-type]
    "no pass": (lambda: request(1, [hidden(8)], pb.PASS_UNSPECIFIED, ROWS), "wire"),
    "a chunk that leaves a gap": (lambda: chunked([(16, 16)]), "wire"),
    "a chunk that repeats bytes": (lambda: chunked([(0, 16), (8, 16)]), "wire"),
    "a chunk beyond the end": (lambda: chunked([(0, 4 * HIDDEN * 8 + 1)]), "wire"),
    "an empty chunk": (lambda: chunked([(0, 0)]), "wire"),
    "a backward of something that was never sent": (
        lambda: request(99, [hidden(8)], pb.PASS_BACKWARD),
        "not-kept",
    ),
    "a decode that continues what was never begun": (
        lambda: request(1, [hidden(1)], pb.PASS_DECODE, [1], sequence=pb.Sequence(id="s", start=4, after=9)),
        "not-kept",
    ),
}


def short(**fields: object) -> list[pb.ClientFrame]:
    """A forward of one row of three tokens, whose rows say more."""
    frames = request(1, [hidden(3)], rows=[3])
    frames[0].call.rows.MergeFrom(pb.Rows(**fields))  # type: ignore[arg-type]
    return frames


def chunked(parts: list[tuple[int, int]]) -> list[pb.ClientFrame]:
    """A correct call, and chunks of zeros of these offsets and sizes."""
    call = forged()[0]
    chunks = [pb.Chunk(key=call.call.key, offset=offset, data=bytes(size)) for offset, size in parts]
    return [call, *(pb.ClientFrame(chunk=chunk) for chunk in chunks)]


@pytest.fixture(scope="module")
def patient(connect: Connect) -> Iterator[Client]:
    """One session for all refusals: none of them may end it."""
    with connect() as client:
        yield client


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_answered_by_name_and_the_session_goes_on(
    case: str, patient: Client, expected: torch.Tensor
) -> None:
    make, code = REFUSED[case]
    answer = patient.ask(*renumbered(make()))
    assert answer.code == code, answer.reply.failure
    assert answer.reply.failure.message
    assert "\n" not in answer.reply.failure.message
    assert len(answer.reply.failure.message) < 400
    answers_as_ever(patient, expected)


_microbatches = itertools.count(1000)


def renumbered(frames: list[pb.ClientFrame]) -> list[pb.ClientFrame]:
    """The frames under a microbatch of their own, for one session serves all cases."""
    microbatch = next(_microbatches)
    for frame in frames:
        (frame.call if frame.HasField("call") else frame.chunk).key.microbatch = microbatch
    return frames


def test_a_gradient_of_the_wrong_shape_is_refused(connect: Connect, expected: torch.Tensor) -> None:
    with connect() as client:
        assert client.ask(*request(1, [hidden(*ROWS)], rows=ROWS, keep=True)).reply.kept
        assert client.ask(*request(1, [hidden(7)], pb.PASS_BACKWARD)).code == "wire"
        answers_as_ever(client, expected)


def test_a_backward_after_release_is_not_kept_and_works_with_its_input(connect: Connect) -> None:
    with connect() as client:
        gradient, values = hidden(*ROWS, seed=1), hidden(*ROWS)
        client.ask(*request(1, [values], rows=ROWS, keep=True))
        first = client.ask(*request(1, [gradient], pb.PASS_BACKWARD)).tensor.clone()
        client.ask(*request(2, [values], rows=ROWS, keep=True))
        client.stream.send(pb.ClientFrame(release=pb.Release(keys=[pb.Key(microbatch=2)])))
        assert client.ask(*request(2, [gradient], pb.PASS_BACKWARD)).code == "not-kept"
        again = client.ask(*request(2, [gradient, values], pb.PASS_BACKWARD, ROWS)).tensor
        assert torch.equal(first, again)


def test_the_same_request_gets_the_same_bits_and_the_same_id_with_other_content_is_refused(connect: Connect) -> None:
    with connect() as client:
        first = client.ask(*request(1, [hidden(*ROWS)], rows=ROWS))
        again = client.ask(*request(1, [hidden(*ROWS)], rows=ROWS))
        assert again.payload == first.payload
        assert client.ask(*request(1, [hidden(*ROWS, seed=1)], rows=ROWS)).code == "repeat"
        assert client.ask(*request(1, [hidden(*ROWS)], rows=(4, 4))).code == "repeat"
        assert client.ask(*request(1, [hidden(*ROWS)], rows=ROWS)).payload == first.payload


def test_a_session_opened_forward_only_has_no_backward(connect: Connect, expected: torch.Tensor) -> None:
    with connect(forward_only=True) as client:
        assert client.ask(*request(1, [hidden(8), hidden(8)], pb.PASS_BACKWARD, ROWS)).code == "forbidden"
        answers_as_ever(client, expected)


def test_more_requests_in_flight_than_allowed_are_refused_one_by_one(
    connect: Connect, card: pb.ModelCard, expected: torch.Tensor
) -> None:
    allowed = card.limits.calls_in_flight
    with connect() as client:
        requests = [request(number, [hidden(*ROWS)], rows=ROWS) for number in range(1, allowed + 2)]
        client.stream.send(*(frames[0] for frames in requests))  # all begin, none is complete
        (refused,) = client.answers(1)
        assert (refused.code, refused.reply.key.microbatch) == ("limit", allowed + 1)
        client.stream.send(*(frame for frames in requests[:-1] for frame in frames[1:]))
        answers = client.answers(allowed)
        assert all(torch.equal(answer.tensor, expected) for answer in answers)
        answers_as_ever(client, expected)


def test_requests_that_declare_much_and_send_nothing_take_no_memory(
    connect: Connect, guarded: Server, card: pb.ModelCard
) -> None:
    limits = card.limits
    before = resident_bytes(guarded)
    with connect() as client:
        shape = [limits.call_tokens, HIDDEN]
        declared = 4 * shape[0] * shape[1]
        for number in range(1, min(limits.calls_in_flight, limits.call_bytes // declared) + 1):
            client.stream.send(forged(b"", microbatch=number, shape=shape, size=declared)[0])
        client.stream.send(pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=3)))
        alive = client.stream.receive()
        assert alive is not None
        assert alive.heartbeat.nonce == 3
        assert resident_bytes(guarded) - before < MAY_GROW


def test_a_decode_cannot_grow_its_cache_beyond_the_limit_of_a_row(connect: Connect, card: pb.ModelCard) -> None:
    limit = card.limits.row_tokens
    with connect() as client:
        begun = request(1, [hidden(limit)], pb.PASS_DECODE, [limit], sequence=pb.Sequence(id="s"))
        assert not client.ask(*begun).code
        place = pb.Sequence(id="s", start=limit, after=1)
        assert client.ask(*request(2, [hidden(1)], pb.PASS_DECODE, [1], sequence=place)).code == "limit"


ENDING = {
    "a chunk of a request that was never begun": pb.ClientFrame(
        chunk=pb.Chunk(key=pb.Key(microbatch=5, pass_kind=pb.PASS_FORWARD), data=b"x")
    ),
    "a second open": pb.ClientFrame(open=pb.Open(protocol=1, session="again")),
    "an empty frame": pb.ClientFrame(),
}


@pytest.mark.parametrize("case", ENDING)
def test_a_frame_that_belongs_nowhere_ends_this_session_and_no_other(
    case: str, connect: Connect, patient: Client, expected: torch.Tensor
) -> None:
    with connect() as client:
        client.stream.send(ENDING[case])
        assert client.ending().code == "wire"
    answers_as_ever(patient, expected)


def test_bytes_that_are_no_frame_end_the_stream_and_no_other(
    connect: Connect, patient: Client, expected: torch.Tensor
) -> None:
    with connect() as client:
        client.stream.send(b"\xff\xff\xff\xff")
        with contextlib.suppress(grpc.RpcError):
            assert [frame.failure.code for frame in client.stream.rest()] == ["wire"]
    answers_as_ever(patient, expected)


def test_a_frame_larger_than_any_message_ends_the_stream_and_no_other(
    guarded: Server, credentials: Credentials, card: pb.ModelCard, patient: Client, expected: torch.Tensor
) -> None:
    with RawStream(guarded.address, credentials) as stream:
        stream.send(pb.ClientFrame(open=opening(card, "frames-large")), bytes(5 << 20))
        with pytest.raises(grpc.RpcError) as refused:
            stream.rest()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    answers_as_ever(patient, expected)


REFUSED_OPENINGS: dict[str, tuple[dict[str, object], str]] = {
    "another protocol": ({"protocol": 999}, "version"),
    "no name": ({"session": ""}, "usage"),
    "a name with a path": ({"session": "../etc"}, "usage"),
    "a name with a line break": ({"session": "good\n"}, "usage"),
    "a name that is too long": ({"session": "x" * 65}, "usage"),
    "a name in another script": ({"session": "sitzüng"}, "usage"),
    "a cut that is not offered": ({"bottom": 2, "top": 2}, "cut"),
    "another model": ({"model_digest": "0" * 64}, "model"),
    "an unknown codec": ({"codec_gradient": "zip"}, "usage"),
}


@pytest.mark.parametrize("case", REFUSED_OPENINGS)
def test_a_session_that_cannot_be_opened_is_refused_by_name(
    case: str, guarded: Server, credentials: Credentials, card: pb.ModelCard
) -> None:
    changes, code = REFUSED_OPENINGS[case]
    changes = {"session": "never", **changes}
    with RawStream(guarded.address, credentials) as stream:
        stream.send(pb.ClientFrame(open=opening(card, **changes)))  # type: ignore[arg-type]
        (frame,) = stream.rest()
        assert frame.failure.code == code


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(request(1, [hidden(1)], rows=[1])[0], id="a call"),
        pytest.param(pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=1)), id="a heartbeat"),
        pytest.param(pb.ClientFrame(), id="nothing"),
    ],
)
def test_a_stream_that_does_not_begin_with_an_open_is_refused(
    frame: pb.ClientFrame, guarded: Server, credentials: Credentials
) -> None:
    with RawStream(guarded.address, credentials) as stream:
        stream.send(frame)
        (answer,) = stream.rest()
        assert answer.failure.code == "wire"
        assert "open" in answer.failure.message


def test_a_session_belongs_to_the_identity_that_opened_it(
    guarded: Server, owner: Path, credentials: Credentials, card: pb.ModelCard, expected: torch.Tensor
) -> None:
    with Client(guarded.address, credentials, opening(card, "frames-mine")) as mine:
        with RawStream(guarded.address, identity(owner, "alice")) as stream:
            stream.send(pb.ClientFrame(open=opening(card, "frames-mine")))
            (frame,) = stream.rest()
            assert frame.failure.code == "owner"
        answers_as_ever(mine, expected)


def test_a_session_cannot_be_opened_again_for_something_else(
    guarded: Server, credentials: Credentials, card: pb.ModelCard, expected: torch.Tensor
) -> None:
    with Client(guarded.address, credentials, opening(card, "frames-twice")) as first:
        with RawStream(guarded.address, credentials) as stream:
            stream.send(pb.ClientFrame(open=opening(card, "frames-twice", codec_activation="int8")))
            (frame,) = stream.rest()
            assert frame.failure.code == "repeat"
        answers_as_ever(first, expected)
