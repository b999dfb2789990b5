"""What Prometheus reads agrees with what an edge's own ledger says, and no peer can make it grow."""

import asyncio
import itertools
import time
from types import SimpleNamespace
from typing import cast

import grpc
import pytest

from cloud_node.audit import Audit
from cloud_node.engine import EngineCard, Load
from cloud_node.metrics import Metrics
from cloud_node.policy.authority import REASONS, Authority
from cloud_node.revoked import Revoked
from cloud_node.service import BackboneService
from cloud_node.session import Session
from cloud_node.status import Status
from cloud_node.watch import CALLS, KINDS, OUTCOMES, PASSES, SessionWatch, Watch
from cloud_node.watch_calls import CallCounter
from edge_client.stream import open_channel
from isthmus.cut import Cut
from isthmus.errors import IsthmusError, LimitError, catalogue
from isthmus.ports import LORA, TAP, Port
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from tests.faults.frames import wire
from tests.faults.training import wait_until
from tests.harness import Server
from tests.watching.conftest import OPEN, Watched
from tests.watching.reading import Series, series_in, total

SESSIONS = "isthmus_sessions"


def grown(watched: Watched, name: str, **labels: str) -> float:
    """By how much the training run made a figure grow."""
    return total(watched.after, name, **labels) - total(watched.before, name, **labels)


def test_bytes_are_those_of_the_edges_ledger_to_the_last_one(watched: Watched) -> None:
    assert grown(watched, "isthmus_wire_bytes_total", direction="in") == watched.ledger["up_bytes"] > 0
    assert grown(watched, "isthmus_wire_bytes_total", direction="out") == watched.ledger["down_bytes"] > 0


def test_requests_and_their_work_are_those_of_the_edges_ledger(watched: Watched) -> None:
    passes = [grown(watched, "isthmus_requests_total", pass_=each, outcome="answered") for each in PASSES.values()]
    assert sum(passes) == watched.ledger["round_trips"]
    assert passes[:2] == [8, 8]  # 4 steps of 2 microbatches, forward and backward
    forward = [grown(watched, "isthmus_flops_total", pass_=each) for each in ("forward", "recompute")]
    assert sum(forward) == watched.ledger["cloud_forward_flops"] > 0
    assert grown(watched, "isthmus_flops_total", pass_="backward") == watched.ledger["cloud_backward_flops"] > 0
    assert total(watched.after, "isthmus_errors_total") == 0


def test_every_answered_request_is_in_each_histogram_and_computing_takes_part_of_its_time(watched: Watched) -> None:
    for each in ("forward", "backward"):
        of = {stage: f"isthmus_request_{stage}_seconds" for stage in ("duration", "queue", "compute")}
        assert {grown(watched, f"{name}_count", pass_=each) for name in of.values()} == {8}
        spent = {stage: grown(watched, f"{name}_sum", pass_=each) for stage, name in of.items()}
        assert 0 < spent["compute"] <= spent["duration"]
        assert spent["queue"] + spent["compute"] <= spent["duration"]


def test_calls_that_are_no_session_are_counted(watched: Watched) -> None:
    series = watched.status.series()
    for call in ("describe", "fetch-ends", "list-emulators", "fetch-emulator"):
        assert total(series, "isthmus_calls_total", call=call, outcome="answered") >= 1, call
        assert total(series, "isthmus_wire_bytes_total", call=call, direction="out") > 0, call
    assert total(series, "isthmus_calls_total", call="fetch-emulator", outcome="answered") == 1


def test_a_session_and_its_stream_stand_there_while_they_are_open(watched: Watched) -> None:
    assert total(watched.before, "isthmus_sessions") == total(watched.before, "isthmus_streams") == 0
    before = watched.status.series()
    with wire(watched.server.address, watched.identity("alice"), "stands-there") as stream:
        assert stream.next().HasField("opened")
        now = watched.status.series()
        more = [total(now, SESSIONS, kind=kind) - total(before, SESSIONS, kind=kind) for kind in KINDS]
        assert more == [1, 0, 0, 0]
        assert total(now, "isthmus_streams") == total(before, "isthmus_streams") + 1


def test_memory_is_told_beside_what_it_may_be(watched: Watched) -> None:
    now = watched.status.series()
    held, budget = total(now, "isthmus_activation_bytes"), total(now, "isthmus_activation_budget_bytes")
    assert 0 < held < budget == 4 << 30  # the open session has kept a forward
    assert total(now, "isthmus_tensor_peak_bytes") >= total(now, "isthmus_weight_bytes") > 0
    assert total(now, "isthmus_resident_memory_peak_bytes") >= total(now, "isthmus_resident_memory_bytes") > 1 << 20
    assert total(now, "isthmus_replicas") == 1


def test_the_certificates_end_is_told(watched: Watched) -> None:
    until = total(watched.status.series(), "isthmus_certificate_expiry_timestamp_seconds")
    assert until == watched.identity("server").expires()
    assert 29 < (until - time.time()) / 86400 <= 30


def test_stages_and_how_often_one_had_to_begin_anew_are_told_without_a_series_for_each() -> None:
    load = Load(restarts=3, missing=1, stages=tuple((place, Load(weight_bytes=10)) for place in (0, 1, 0, 1)))
    card = EngineCard((Cut(1, 1),), 32, "float32", "cpu", engine="ray")
    well = SimpleNamespace(missing=lambda within_s: None)
    counts = {"watch": Watch(), "authority": Authority()}
    service = SimpleNamespace(load=lambda: load, draining=False, describe=lambda: card, health=well, **counts)
    told = Status()
    told.service = cast(BackboneService, service)
    series = series_in(Metrics(told).text().decode())
    assert (total(series, "isthmus_stages"), total(series, "isthmus_stage_restarts_total")) == (4, 3)
    assert total(series, "isthmus_stages_missing") == 1
    assert total(series, "isthmus_build_info", engine="ray") == 1


def ask_strangely(server: Server, watched: Watched) -> None:
    """Sessions of odd names that ask for what there is not, one of no cut offered, and a bundle that nobody has."""
    identity = watched.identity("alice")
    with open_channel(server.address, identity) as channel, pytest.raises(grpc.RpcError):
        list(pb_grpc.BackboneStub(channel).FetchEnds(pb.FetchRequest(bundle="nobody's")))
    for name in ("x" * 64, "..", "DROP-TABLE", 'a"b{c}', "né\nnew"):
        with wire(server.address, identity, name) as stream:
            for number, kind in enumerate((99, pb.PASS_PARK), 1):
                stream.send(call=pb.Call(key=pb.Key(microbatch=number, pass_kind=kind)))
            stream.send(chunk=pb.Chunk(key=pb.Key(microbatch=77), data=b"1"))
            for _ in stream:
                pass
    with wire(server.address, identity, "other-cut", cut=(3, 1)) as stream:
        assert [frame.failure.code for frame in stream] == ["cut"]


def test_strange_peers_and_their_errors_add_no_series(watched: Watched) -> None:
    before = watched.status.series()
    ask_strangely(watched.server, watched)
    wait_until(lambda: watched.status.figures()["sessions"]["streams"] == 1, "the strange streams to end")
    after = watched.status.series()
    assert set(after) == set(before) == set(watched.before)
    counted = {kind: total(after, "isthmus_errors_total", kind=kind) for kind in catalogue()}
    assert {kind for kind, count in counted.items() if count} == {"bundle", "cut", "forbidden", "usage", "wire"}
    assert total(after, "isthmus_calls_total", call="fetch-ends", outcome="refused") == 1
    assert total(after, "isthmus_requests_total", pass_="other", outcome="refused") == 3


def test_labels_are_settled_beforehand_and_name_nobody(watched: Watched) -> None:
    series: Series = watched.status.series()
    values = {(label, value) for _, labels in series for label, value in labels}
    known = {
        "kind": {*catalogue(), *KINDS},
        "pass": {*PASSES.values(), "recompute"},
        "outcome": set(OUTCOMES),
        "call": {"exchange", *CALLS},
        "direction": {"in", "out"},
        "reason": set(REASONS),
    }
    about = {"version", "protocol", "torch", "engine", "device", "dtype", "le"}
    assert {label for label, _ in values} == known.keys() | about
    assert all(value in known[label] for label, value in values if label in known)
    assert OPEN not in str(values)
    assert "alice" not in str(values)
    assert len(series) < 600


@pytest.mark.parametrize(
    ("kind", "forward_only", "ports"),
    [
        ("train", False, ()),
        ("forward-only", True, ()),
        ("side", True, (Port(2, 8, kind=TAP),)),
        ("dlora", False, (Port(2, module="q", kind=LORA),)),
    ],
)
def test_a_session_is_of_one_kind_by_what_it_was_opened_for(
    kind: str, forward_only: bool, ports: tuple[Port, ...]
) -> None:
    session = Session("s", "someone", Cut(1, 1), "none", "none", forward_only, ports, "none" if ports else "")
    assert SessionWatch(Watch(), session).kind == kind


def test_a_call_that_fails_unexpectedly_is_an_internal_error() -> None:
    async def fails(request: pb.DescribeRequest, context: object) -> pb.ModelCard:
        raise ZeroDivisionError

    async def handler(details: grpc.HandlerCallDetails) -> object:
        return grpc.unary_unary_rpc_method_handler(fails)

    async def call(watch: Watch) -> None:
        details = cast(grpc.HandlerCallDetails, SimpleNamespace(method="/isthmus.v1.Backbone/Describe"))
        counted = await CallCounter(watch, Audit(), Revoked(None)).intercept_service(handler, details)
        await counted.unary_unary(pb.DescribeRequest(), SimpleNamespace(auth_context=dict))

    watch = Watch()
    with pytest.raises(ZeroDivisionError):
        asyncio.run(call(watch))
    assert watch.calls["describe", "failed"] == 1
    assert {kind: count for kind, count in watch.errors.items() if count} == {"internal": 1}


def test_an_error_that_the_catalogue_did_not_know_counts_as_internal() -> None:
    watch = Watch()

    class LateError(IsthmusError):
        code = "made-up-by-a-peer"

    for error in (LateError("?"), ValueError("?"), LimitError("?")):
        watch.error(error)
    assert {kind: count for kind, count in watch.errors.items() if count} == {"internal": 2, "limit": 1}


def test_durations_fall_under_the_bound_that_they_do_not_exceed() -> None:
    durations = Watch().durations["duration", "forward"]
    for seconds in (0.0, 0.001, 0.0011, 60.0, 61.0):
        durations.add(seconds)
    counts = durations.cumulative()
    assert (counts[0], counts[1], counts[-2], counts[-1]) == (2, 3, 4, 5)
    assert all(before <= after for before, after in itertools.pairwise(counts))
    assert durations.total_s == pytest.approx(121.0021)
