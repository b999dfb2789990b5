"""The line to a cloud ends in words whatever the other side does, and leaves nothing waiting or held."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from cloud_node.calls import Limits
from cloud_node.engine import Opening, Place
from cloud_node.in_process import InProcessEngine
from cloud_node.loading import load_spans
from edge_client.link import Link
from edge_client.runs import RunDirectory
from isthmus import PROTOCOL
from isthmus.cut import Cut
from isthmus.errors import NotKeptError, RunError, UnreachableError, WireError
from isthmus.ledger.record import Ledger
from isthmus.rows import Rows
from isthmus.wire.frames import EXCHANGE, read_client_frame, serialise
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack
from tests.faults.training import run_here, settings
from tests.harness import Server, save_tiny_model, serving, write_rows

KEY = pb.Key(microbatch=1, pass_kind=pb.PASS_FORWARD)
NOT_A_NUMBER = pb.Reply(key=KEY, cost=pb.Cost(forward_s=float("nan")))


def answering(*frames: Any) -> Any:
    """A server that opens a session and answers the first call with these frames, whatever was asked."""

    def exchange(sent: Any, _: Any) -> Any:
        yield pb.ServerFrame(opened=pb.Opened(server_version="x"))
        for frame in sent:
            if isinstance(frame, pb.ClientFrame) and frame.HasField("call"):
                yield from frames

    handler = grpc.stream_stream_rpc_method_handler(exchange, read_client_frame, serialise)
    server = grpc.server(ThreadPoolExecutor(2))
    service, method = EXCHANGE.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


def asked(link: Link) -> Any:
    header, payload = pack(torch.ones(2, 32), "none")
    call = pb.Call(key=KEY, tensors=[header], rows=pb.Rows(row_lengths=[2]))
    return link.request(call, [payload], "train")


@pytest.mark.parametrize(
    "frames",
    [
        (pb.ServerFrame(reply=NOT_A_NUMBER),),
        (pb.ServerFrame(tally=pb.Tally()),),
        (pb.ServerFrame(chunk=pb.Chunk(key=KEY, data=b"x")),),
    ],
    ids=["a cost that is no number", "a count nobody asked for", "a chunk before its answer"],
)
def test_an_answer_that_breaks_the_contract_ends_the_request_in_words(frames: tuple[pb.ServerFrame, ...]) -> None:
    server, address = answering(*frames)
    link = Link(address, None, pb.Open(protocol=PROTOCOL, session="s"), Ledger(), Limits().to_wire())
    with pytest.raises(WireError):
        asked(link).result(timeout=30)
    link.close()
    server.stop(0)


def test_closing_the_line_ends_what_still_waits() -> None:
    server, address = answering()
    link = Link(address, None, pb.Open(protocol=PROTOCOL, session="s"), Ledger(), Limits().to_wire())
    waiting = asked(link)
    link.close()
    with pytest.raises(UnreachableError, match="closed"):
        waiting.result(timeout=30)
    server.stop(0)


def test_more_microbatches_than_the_server_takes_at_once_wait_their_turn(
    servers: dict[str, Server], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "many.jsonl", count=100)
    many = settings(servers["llama"], rows, steps=1, batch_size=100, microbatches=100)
    assert run_here(many, tmp_path / "run").status == "complete"


def test_a_run_does_not_resume_on_another_model_or_other_data(
    servers: dict[str, Server], rows: Path, tmp_path: Path, cache: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(rows.read_bytes())
    out = tmp_path / "run"
    run_here(settings(servers["llama"], data, steps=4), out)
    save_tiny_model(tmp_path / "other", "llama", seed=7)
    with serving(tmp_path / "other", "--cut", "1:1", cache=cache) as other:
        config = RunDirectory(out).config().resumed({"server": other.address})
        with pytest.raises(RunError, match="model is not what this run began with"):
            run_here(config, out, resume=True)
    data.write_text(data.read_text().replace("good", "poor"))
    with pytest.raises(RunError, match="data file is not what this run began with"):
        run_here(RunDirectory(out).config(), out, resume=True)


def test_a_damaged_run_is_not_silently_begun_again(servers: dict[str, Server], rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_here(settings(servers["llama"], rows, steps=4), out)
    for checkpoint in (out / "checkpoints").iterdir():
        checkpoint.write_bytes(b"torn")
    with pytest.raises(RunError, match="damaged"):
        run_here(RunDirectory(out).config(), out, resume=True)


@pytest.fixture(scope="module")
def engine(tiny_models: dict[str, Path]) -> InProcessEngine:
    spans = load_spans(tiny_models["llama"], [Cut(1, 1)], torch.float32, torch.device("cpu"))
    return InProcessEngine(spans, "cpu", 32, 2 << 20)


def forward(engine: InProcessEngine, session: str, lengths: tuple[int, ...]) -> bool:
    rows = Rows(lengths, (0,) * len(lengths))
    return engine.forward(session, uuid.uuid4().int % 2**60, torch.randn(rows.tokens, 32), rows, keep=True).kept


def test_a_closed_session_is_refused_and_holds_nothing(engine: InProcessEngine) -> None:
    engine.open("gone", Opening(Cut(1, 1)))
    assert forward(engine, "gone", (8,))
    engine.close("gone")
    assert engine._store.held_bytes == 0
    with pytest.raises(NotKeptError, match="closed"):
        forward(engine, "gone", (8,))
    assert engine._store.held_bytes == 0


def test_one_tenants_odd_batch_does_not_stop_anothers_from_being_kept(engine: InProcessEngine) -> None:
    engine.open("odd", Opening(Cut(1, 1)))
    engine.open("even", Opening(Cut(1, 1)))
    assert forward(engine, "even", (8, 8))
    forward(engine, "odd", (200, *(1,) * 8))
    assert forward(engine, "even", (8, 8))
    engine.close("odd")
    engine.close("even")


def test_decode_caches_are_held_to_the_sessions_share(tiny_models: dict[str, Path]) -> None:
    spans = load_spans(tiny_models["llama"], [Cut(1, 1)], torch.float32, torch.device("cpu"))
    engine = InProcessEngine(spans, "cpu", 32, 100_000)
    engine.open("s", Opening(Cut(1, 1)))
    rows = Rows((100,), (0,))
    for number in range(12):
        engine.decode("s", number + 1, torch.randn(100, 32), rows, Place(f"g{number}", 0, 0))
        assert engine.load().held_bytes <= 100_000
    assert engine.load().held_bytes
