"""The ledger is true: both sides count alike, the bytes are those of the arithmetic, and the files add up."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from edge_client.assemble import connect
from edge_client.server import choose_cut, describe
from edge_client.stream import open_channel
from isthmus.ledger.record import PHASES, Ledger
from isthmus.receiver import Receiver
from isthmus.report.schema import RunReport
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from tests.faults.training import run_here, settings
from tests.harness import Server, write_rows

WIDTH = 32
VALUE = 4  # bytes of a float32
ROWS, BATCH, EPOCHS = 24, 8, 2


def spent(out: Path) -> dict[str, Counter[str]]:
    """The sums of ledger.jsonl by phase; counts only."""
    sums: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
    for line in (out / "ledger.jsonl").read_text().splitlines():
        entry = json.loads(line)
        sums[entry["phase"]].update({name: value for name, value in entry.items() if isinstance(value, int)})
    return sums


def tokens_of(data: Path) -> tuple[int, int]:
    """Positions that are run, and those that carry loss, counted from the text: one token is one byte."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    answers = [len(row["choices"][row["answer"]]) for row in rows]
    return sum(len(row["prompt"]) + answer - 1 for row, answer in zip(rows, answers, strict=True)), sum(answers)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bytes_of_training_are_those_of_the_arithmetic(
    servers: dict[str, Server], rows: Path, tmp_path: Path, family: str, microbatches: int
) -> None:
    config = settings(servers[family], rows, steps=EPOCHS * ROWS // BATCH, microbatches=microbatches)
    report = run_here(config, tmp_path / "run")
    train, (real, _) = spent(tmp_path / "run")["train"], tokens_of(rows)
    assert report.tokens.real == EPOCHS * real
    assert train["up_payload_bytes"] == train["down_payload_bytes"] == 2 * EPOCHS * real * WIDTH * VALUE
    assert train["round_trips"] == 2 * report.steps * microbatches


@pytest.mark.parametrize(("codec", "bytes_per_value"), [("bf16", 2.0), ("int8", 1 + 2 / 64)])
def test_a_codec_saves_what_it_says(
    servers: dict[str, Server], rows: Path, tmp_path: Path, codec: str, bytes_per_value: float
) -> None:
    config = settings(servers["llama"], rows, steps=ROWS // BATCH, codec=codec, codec_gradient="none")
    run_here(config, tmp_path / "run")
    train, (real, _) = spent(tmp_path / "run")["train"], tokens_of(rows)
    expected = real * WIDTH * (bytes_per_value + VALUE)
    assert expected <= train["up_payload_bytes"] <= expected + 2 * ROWS // BATCH  # the last block of a tensor is short
    assert train["down_payload_bytes"] == train["up_payload_bytes"]


def test_with_no_block_above_the_span_only_what_carries_loss_comes_back(
    servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    run_here(settings(servers["llama"], rows, cut="2:0", steps=EPOCHS * ROWS // BATCH), tmp_path / "run")
    train, (real, counted) = spent(tmp_path / "run")["train"], tokens_of(rows)
    forward_up = backward_down = real
    forward_down = backward_up = counted
    assert counted < real
    assert train["up_payload_bytes"] == EPOCHS * (forward_up + backward_up) * WIDTH * VALUE
    assert train["down_payload_bytes"] == EPOCHS * (forward_down + backward_down) * WIDTH * VALUE


def test_with_nothing_to_train_below_the_span_no_gradient_crosses(
    servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    report = run_here(settings(servers["llama"], rows, cut="0:2", steps=EPOCHS * ROWS // BATCH), tmp_path / "run")
    train, (real, _) = spent(tmp_path / "run")["train"], tokens_of(rows)
    assert train["up_payload_bytes"] == train["down_payload_bytes"] == EPOCHS * real * WIDTH * VALUE
    assert train["round_trips"] == report.steps
    assert report.cost.cloud.backward_flops == 0
    assert report.cost.cloud.forward_flops


def test_the_overhead_of_a_step_of_ordinary_size_is_under_one_percent(
    servers: dict[str, Server], tmp_path: Path
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"text": "a long row " * length}) + "\n" for length in range(14, 22)))
    wire = run_here(settings(servers["llama"], data, steps=3), tmp_path / "run").cost.wire
    assert 0 < wire.overhead_bytes < 0.01 * (wire.up_bytes + wire.down_bytes)


@pytest.fixture(scope="module")
def whole(servers: dict[str, Server], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that does everything, into an empty cache."""
    out = tmp_path_factory.mktemp("whole") / "run"
    held_out = write_rows(out.parent / "held-out.jsonl", count=10, seed=3)
    config = settings(servers["llama"], rows, steps=4, eval_data=held_out, sample="good:")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE", str(out.parent / "cache"))
        run_here(config, out)
    return out


def test_the_two_sides_agree_to_the_byte_on_an_undisturbed_run(whole: Path) -> None:
    agreement = RunReport.load(whole).agreement
    assert agreement is not None
    assert agreement.equal
    assert agreement.unchecked_streams == 0
    assert agreement.edge.sent_bytes == agreement.cloud.received_bytes > 0
    assert agreement.edge.received_bytes == agreement.cloud.sent_bytes > 0


def test_what_both_sides_counted_is_what_the_phases_say(whole: Path, servers: dict[str, Server]) -> None:
    report = RunReport.load(whole)
    phases, agreement = report.cost.wire.by_phase, report.agreement
    assert agreement is not None
    card_request, card = _describe_bytes(servers["llama"])
    sessions = [getattr(phases, name) for name in ("train", "eval", "generate", "control")]
    assert sum(each.up_bytes for each in sessions) == agreement.edge.sent_bytes + card_request
    answer = sum(each.down_bytes for each in sessions) - agreement.edge.received_bytes - card
    assert 0 < answer < 64  # the cloud's own count, which cannot count itself


def _describe_bytes(server: Server) -> tuple[int, int]:
    ledger = Ledger()
    describe(server.address, None, ledger)
    return int(ledger.total("control", "up_bytes")), int(ledger.total("control", "down_bytes"))


def test_every_phase_is_there_where_it_happened(whole: Path) -> None:
    phases = RunReport.load(whole).cost.wire.by_phase
    assert (phases.submit.up_bytes, phases.submit.down_bytes) == (0, 0)  # which is for a run that is done
    for name in set(PHASES) - {"submit"}:
        assert getattr(phases, name).up_bytes > 0, name
        assert getattr(phases, name).down_bytes > 0, name
    assert spent(whole)["generate"]["round_trips"] > 1


def test_what_did_not_happen_costs_nothing(servers: dict[str, Server], rows: Path, tmp_path: Path) -> None:
    connect(settings(servers["llama"], rows), Ledger(), lambda *_: None).close()  # the ends are in the cache now
    phases = run_here(settings(servers["llama"], rows, steps=1), tmp_path / "run").cost.wire.by_phase
    for name in ("fetch", "eval", "generate"):
        assert (getattr(phases, name).up_bytes, getattr(phases, name).down_bytes) == (0, 0), name


def test_the_lines_of_the_ledger_add_up_to_the_report(whole: Path) -> None:
    cost, sums = RunReport.load(whole).cost, spent(whole)
    for name in PHASES:
        traffic = getattr(cost.wire.by_phase, name)
        assert (sums[name]["up_bytes"], sums[name]["down_bytes"]) == (traffic.up_bytes, traffic.down_bytes), name
    train = sums["train"]
    assert (cost.wire.up_bytes, cost.wire.down_bytes) == (train["up_bytes"], train["down_bytes"])
    assert cost.wire.round_trips == train["round_trips"]
    payload = train["up_payload_bytes"] + train["down_payload_bytes"]
    assert cost.wire.overhead_bytes == train["up_bytes"] + train["down_bytes"] - payload
    for side, block in (("edge", cost.edge), ("cloud", cost.cloud)):
        assert block.forward_flops == train[f"{side}_forward_flops"] > 0
        assert block.backward_flops == train[f"{side}_backward_flops"] > 0
    lines = [json.loads(line) for line in (whole / "ledger.jsonl").read_text().splitlines()]
    waited = math.fsum(line.get("edge_wait_s", 0.0) for line in lines if line["phase"] == "train")
    assert cost.edge.wait_s == pytest.approx(waited)


def test_the_ends_are_fetched_once_and_an_interrupted_fetch_goes_on_where_it_stopped(
    servers: dict[str, Server], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    config = settings(servers["llama"], rows)
    _, offer = choose_cut(describe(servers["llama"].address, None, Ledger()), "1:1")
    receiver = Receiver(tmp_path / "bundles", offer.ends_bundle, None)
    with open_channel(servers["llama"].address, None) as channel:
        answer = pb_grpc.BackboneStub(channel).FetchEnds(pb.FetchRequest(bundle=offer.ends_bundle))
        for frame in answer:
            if frame.manifest:
                receiver.begin(frame.manifest, frame.signature)
            elif receiver.offset <= offer.ends_bytes // 2:
                receiver.add(frame.offset, frame.data[: max(1, len(frame.data) - 100)])  # torn within a chunk
                break
        answer.cancel()
    had = receiver.offset
    assert 0 < had < offer.ends_bytes

    rest = Ledger()
    connect(config, rest, lambda *_: None).close()
    assert rest.total("fetch", "down_payload_bytes") == offer.ends_bytes - had
    cached = Ledger()
    connect(config, cached, lambda *_: None).close()
    assert cached.totals("fetch") == {}
