"""Limits over the wire: each is refused by name, and says when to come again where that helps."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch

from cloud_node.policy import tenant
from isthmus.errors import LATEST_S, ForbiddenError, LimitError
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.status import failure, read_failure, read_status, status_details
from tests.bad_input.raw import Client, RawStream, describe, hidden, opening, request
from tests.dlora.frames import PortClient, port_opening
from tests.faults.training import run_here, settings, wait_until
from tests.policy.conftest import Nodes, tenants, write
from tests.watching.reading import StatusPort

Connect = Callable[..., Client]


@pytest.fixture
def connect(nodes: Nodes) -> Connect:
    """A session of a tenant's at cut 1:1."""

    def to(role: str, name: str = "one") -> Client:
        card = describe(nodes.guarded.address, nodes.credentials(role))
        return Client(nodes.guarded.address, nodes.credentials(role), opening(card, name, bottom=1, top=1))

    return to


def forward(microbatch: int, *rows: int, seed: int = 0, **fields: object) -> list[pb.ClientFrame]:
    return request(microbatch, [hidden(*rows, seed=seed)], rows=rows, **fields)


def backward(microbatch: int, tokens: int, seed: int) -> list[pb.ClientFrame]:
    return request(microbatch, [hidden(tokens, seed=seed)], pb.PASS_BACKWARD)


def test_a_row_that_is_too_long_is_refused_and_the_card_says_what_is_not(connect: Connect, nodes: Nodes) -> None:
    assert describe(nodes.guarded.address, nodes.credentials("short")).limits.row_tokens == 16
    with connect("short") as client:
        assert client.ask(*forward(1, 16)).code == ""
        refused = client.ask(*forward(2, 17))
        assert (refused.code, refused.reply.failure.retry_after_s) == ("limit", 0)
        ahead = pb.Sequence(id="text", start=12)
        assert client.ask(*request(3, [hidden(5)], pb.PASS_DECODE, rows=(5,), sequence=ahead)).code == "limit"


def test_one_session_too_many_is_told_when_to_come_again_and_taken_once_there_is_room(
    connect: Connect, nodes: Nodes
) -> None:
    card = describe(nodes.guarded.address, nodes.credentials("few"))

    def third() -> pb.ServerFrame | None:
        with RawStream(nodes.guarded.address, nodes.credentials("few")) as stream:
            stream.send(pb.ClientFrame(open=opening(card, "three")))
            found = stream.receive()
            stream.finish()
            return found

    with connect("few", "one"):
        with connect("few", "two"):
            refused = third()
            assert refused is not None
            assert refused.failure.code == "limit"
            assert refused.failure.retry_after_s > 0
        taken = third()
        assert taken is not None
        assert taken.HasField("opened")


def test_tokens_in_flight_count_over_all_sessions_until_they_are_answered(connect: Connect) -> None:
    with connect("narrow", "one") as one, connect("narrow", "two") as two:
        call, *chunks = forward(1, 40)
        one.stream.send(call)
        one.stream.send(pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=1)))
        assert one.stream.receive() is not None  # so the call is here too
        refused = two.ask(*forward(1, 40))
        assert refused.code == "limit"
        assert refused.reply.failure.retry_after_s > 0
        assert one.ask(*chunks).code == ""
        assert two.ask(*forward(1, 40)).code == "", "the same request, once there is room"
        alone = two.ask(*forward(2, 65))
        assert (alone.code, alone.reply.failure.retry_after_s) == ("limit", 0)


def test_what_runs_on_after_its_line_broke_still_counts_and_may_be_asked_for_again(
    connect: Connect, nodes: Nodes
) -> None:
    """Else a tenant could have any number of tokens computed by breaking its line off."""
    card, credentials = describe(nodes.guarded.address, nodes.credentials("narrow")), nodes.credentials("narrow")
    long = request(1, [hidden(40)], rows=(40,), keep=True, input_gradient=True)
    status, streams = StatusPort.of(nodes.guarded), ("isthmus_streams", frozenset[tuple[str, str]]())
    gone = PortClient(nodes.guarded.address, credentials, port_opening(card, "broken"))
    gone.begin(*long)
    before = status.series()[streams]
    gone.leave()
    wait_until(lambda: status.series()[streams] < before, "the node to notice")
    with connect("narrow", "beside") as beside:
        assert beside.ask(*forward(1, 40)).code == "limit"
        with PortClient(nodes.guarded.address, credentials, port_opening(card, "broken")) as back:
            assert back.through(*long)[0].code == ""
        assert beside.ask(*forward(1, 40)).code == ""


def test_a_days_tokens_are_charged_once_for_each_request(connect: Connect) -> None:
    with connect("daily") as client:
        for _ in range(3):
            assert client.ask(*forward(1, 15)).code == ""
        refused = client.ask(*forward(2, 6))
        assert refused.code == "limit"
        assert 0 < refused.reply.failure.retry_after_s <= 86400
        assert "15 of its 20 tokens" in refused.reply.failure.message
        assert client.ask(*forward(3, 5)).code == ""
        assert client.ask(*forward(1, 15)).code == "", "a repeat is free"


def test_too_many_bytes_a_second_wait_for_as_long_as_they_take(connect: Connect) -> None:
    with connect("slow") as client:
        assert client.ask(*forward(1, 16)).code == ""
        refused = client.ask(*forward(2, 16))
        assert refused.code == "limit"
        assert refused.reply.failure.retry_after_s > 10, "2 x 16 x 32 x 4 bytes at 200 a second, less what has passed"


def test_an_edge_waits_for_its_limits_and_trains_to_the_end(nodes: Nodes, rows: Path, tmp_path: Path) -> None:
    """Its ends and its requests are more than a second's bytes, so it was made to wait; the run is whole."""
    config = settings(nodes.guarded, rows, certs=nodes.owner / "paced", steps=3, batch_size=4, microbatches=2)
    assert run_here(config, tmp_path / "run").steps == 3
    assert "/paced may move 20,000 bytes a second" in nodes.guarded.log


def test_one_input_is_given_so_many_gradients_however_they_are_asked_for(connect: Connect) -> None:
    with connect("thrice") as client:
        assert client.ask(*forward(1, 4, keep=True)).code == ""
        for _ in range(4):
            assert client.ask(*backward(1, 4, seed=1)).code in ("", "not-kept"), "a repeat counts for nothing"
        same = hidden(4)
        again = [hidden(4, seed=2), same]
        assert client.ask(*request(2, again, pb.PASS_BACKWARD, rows=(4,))).code == ""
        twice = [hidden(8, seed=3), torch.cat([same, same])]  # as rows of one request
        assert client.ask(*request(3, twice, pb.PASS_BACKWARD, rows=(4, 4))).code == "limit", (
            "the fourth is one too many"
        )
        assert client.ask(*request(6, [hidden(4, seed=7), same], pb.PASS_BACKWARD, rows=(4,))).code == ""
        refused = client.ask(*request(4, again, pb.PASS_BACKWARD, rows=(4,)))
        assert refused.code == "limit"
        assert "gradients_per_input" in refused.reply.failure.message
        other = [hidden(4, seed=5), hidden(4, seed=6)]
        assert client.ask(*request(5, other, pb.PASS_BACKWARD, rows=(4,))).code == "", "another input"


def again(microbatch: int, tokens: int, gradient: int, brought: int) -> list[pb.ClientFrame]:
    both = [hidden(tokens, seed=gradient), hidden(tokens, seed=brought)]
    return request(microbatch, both, pb.PASS_BACKWARD, rows=(tokens,))


def test_another_input_beside_the_one_that_is_kept_does_not_hide_it(connect: Connect) -> None:
    with connect("thrice", "beside") as client:
        codes = []
        for number in range(1, 5):
            assert client.ask(*forward(number, 4, keep=True, seed=50)).code == ""
            codes.append(client.ask(*again(number, 4, number, 60 + number)).code)
        assert codes == ["", "", "", "limit"]


def test_another_input_sent_before_under_the_same_name_does_not_hide_the_next(connect: Connect) -> None:
    with connect("thrice", "before") as client:
        codes = []
        for number in range(1, 5):
            assert client.ask(*again(number, 4, number, 80 + number)).code == ""
            codes.append(client.ask(*again(number, 4, number, 90)).code)
        assert codes == ["", "", "", "limit"]


def test_a_backward_that_brings_another_input_is_charged_like_any_other(connect: Connect) -> None:
    with connect("daily_again") as client:
        assert [client.ask(*again(1, 15, 1, 2)).code for _ in range(2)] == ["", ""], "a repeat is free"
        assert client.ask(*again(1, 15, 1, 3)).code == "limit"


def test_a_backward_is_charged_for_the_input_that_it_brings_however_few_gradients_come_with_it(
    connect: Connect,
) -> None:
    with connect("daily_few") as client:
        assert client.ask(*request(1, [hidden(1), hidden(21)], pb.PASS_BACKWARD, rows=(21,))).code == "limit"


def test_hidden_states_far_beyond_the_models_own_are_refused(connect: Connect) -> None:
    with connect("alice", "far") as client:
        refused = client.ask(*request(1, [1e5 * hidden(4)], rows=(4,)))
        assert refused.code == "wire"
        assert "hidden_margin" in refused.reply.failure.message
        assert client.ask(*request(2, [100 * hidden(4)], rows=(4,))).code == ""


def test_refusals_are_counted_by_why(connect: Connect, nodes: Nodes) -> None:
    status = StatusPort.of(nodes.guarded)
    counter = "isthmus_policy_refusals_total", frozenset({("reason", "sequence_length")})
    before = status.series()[counter]
    with connect("short", "counted") as client:
        client.ask(*forward(1, 17))
    assert status.series()[counter] == before + 1


def test_what_is_newly_forbidden_ends_open_sessions_and_those_alone(
    connect: Connect, nodes: Nodes, tiny_models: dict[str, Path]
) -> None:
    held = tenants(tiny_models["llama"].name)
    with connect("alice", "stays") as stays, connect("leaving") as leaving:
        write(nodes.file, {name: rights for name, rights in held.items() if name != "leaving"})
        try:
            ended = leaving.ending()
            assert (ended.code, "add `leaving:` under `tenants:`" in ended.message) == ("forbidden", True)
            assert stays.ask(*forward(1, 4)).code == ""
            with pytest.raises(grpc.RpcError) as caught:
                describe(nodes.guarded.address, nodes.credentials("leaving"))
            assert isinstance(read_status(caught.value.details()), ForbiddenError)
        finally:
            write(nodes.file, held)


@pytest.mark.parametrize("retry_after_s", [None, 0.25, 12.5])
def test_when_to_come_again_crosses_in_a_stream_and_in_a_status(retry_after_s: float | None) -> None:
    error = LimitError("too much", retry_after_s)
    for read in (read_failure(failure(error)), read_status(status_details(error))):
        assert isinstance(read, LimitError)
        assert (str(read), read.retry_after_s) == ("too much", retry_after_s)


@pytest.mark.parametrize(("said", "read"), [("nan", None), ("-1", None), ("inf", None), ("x", None), ("1e9", LATEST_S)])
def test_what_a_peer_says_of_it_that_makes_no_sense_is_nothing_said(said: str, read: float | None) -> None:
    error = read_status(f"limit@{said}: too much")
    assert isinstance(error, LimitError)
    assert error.retry_after_s == read


def test_equal_rows_of_one_request_count_each_and_a_crowd_of_others_does_not_make_a_row_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tenant, "INPUTS", 50)
    counts = tenant.Gradients()
    with pytest.raises(LimitError, match="100 gradients"):
        counts.count(b"at once", [b"x"] * 101, 100)
    counts.count(b"first", [b"x"] * 100, 100)
    for crowd in range(20):
        counts.count(b"crowd %d" % crowd, [b"%d %d" % (crowd, row) for row in range(50)], 100)
    with pytest.raises(LimitError):
        counts.count(b"once more", [b"x"], 100)
    counts.count(b"first", [b"x"] * 100, 100)
