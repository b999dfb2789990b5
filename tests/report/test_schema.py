"""A report is what the contract says, survives the disk unchanged and is refused when it lies."""

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from isthmus.errors import RunError
from isthmus.ledger.record import Ledger
from isthmus.report.costs import from_ledger, port_costs
from isthmus.report.fields.cost import Agreement, Cache, CacheUse, SideCount
from isthmus.report.fields.ports import BlockCost, Decision, KillRevive, PortCost, Ports
from isthmus.report.fields.run import Codecs, SideNetwork, Tokens
from isthmus.report.fields.score import Score
from isthmus.report.schema import RunReport, json_schema
from tests.report.example import caching, dlora, ports, report, settings

COMMITTED = Path(__file__).parents[2] / "docs" / "run.schema.json"

_SIDE = {"forward_flops", "backward_flops", "forward_s", "backward_s", "peak_tensor_bytes", "peak_memory_bytes"}
CONTRACT: dict[str, set[str]] = {
    "": {
        *("schema", "method", "exchange", "model", "model_digest", "cut", "peft_type", "seed", "deterministic"),
        *("steps", "epochs", "tokens", "eval", "params", "throughput", "cost"),
    },
    "tokens": {"real", "padded"},
    "eval": {"rows", "before", "after"},
    "eval.before": {"loss", "accuracy"},
    "eval.after": {"loss", "accuracy"},
    "params": {"trainable", "head", "changed", "rank", "stored_bytes"},
    "throughput": {"train_tokens_per_s", "eval_tokens_per_s"},
    "cost": {"wire", "edge", "cloud"},
    "cost.wire": {"up_bytes", "down_bytes", "overhead_bytes", "round_trips", "by_phase"},
    "cost.wire.by_phase": {"fetch", "train", "eval", "generate", "control"},
    "cost.wire.by_phase.generate": {"up_bytes", "down_bytes"},
    "cost.edge": _SIDE | {"wait_s"},
    "cost.cloud": _SIDE | {"queue_s"},
}


def written(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_a_saved_report_loads_unchanged_from_its_directory_and_from_its_file(tmp_path: Path) -> None:
    report().save(tmp_path)
    assert RunReport.load(tmp_path) == RunReport.load(tmp_path / "run.json") == report()
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_saving_again_puts_a_whole_new_file_in_the_old_ones_place(tmp_path: Path) -> None:
    report(seed=1).save(tmp_path)
    (tmp_path / "old.json").hardlink_to(tmp_path / "run.json")
    report(seed=2).save(tmp_path)
    assert (RunReport.load(tmp_path / "old.json").seed, RunReport.load(tmp_path).seed) == (1, 2)


@pytest.mark.parametrize("place", CONTRACT)
def test_every_field_of_the_contract_stands_where_it_should(tmp_path: Path, place: str) -> None:
    report().save(tmp_path)
    block = written(tmp_path / "run.json")
    for key in filter(None, place.split(".")):
        block = block[key]
    assert CONTRACT[place] <= block.keys()


def test_a_saved_report_validates_against_the_published_schema(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(COMMITTED.read_text()))
    report(agreement=None, epochs=None, samples=()).save(tmp_path)
    validator.validate(written(tmp_path / "run.json"))
    report().save(tmp_path)
    document = written(tmp_path / "run.json")
    validator.validate(document)
    for wrong in (document | {"seed": -1}, document | {"extra": 1}, document | {"schema": "isthmus-run/0"}):
        assert not validator.is_valid(wrong)
    del document["cost"]
    assert not validator.is_valid(document)


def test_a_forward_only_run_validates_and_comes_back_and_an_older_report_still_loads(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(COMMITTED.read_text()))
    run = caching((5, 3), (2, 1)).model_copy(
        update={
            "train": "top",
            "side": SideNetwork(reduction=8, tap_every=4, tap_width=64, taps=6),
            "codecs": Codecs(activation="int8", gradient=None, port="bf16"),
        }
    )
    run.save(tmp_path)
    assert RunReport.load(tmp_path) == run
    document = written(tmp_path / "run.json")
    validator.validate(document)
    assert not validator.is_valid(document | {"train": "bottom"})
    del document["train"], document["side"], document["codecs"]["port"], document["cost"]["wire"]["cache"]
    (tmp_path / "run.json").write_text(json.dumps(document))
    older = RunReport.load(tmp_path)
    assert (older.train, older.side, older.cost.wire.cache) == (None, None, None)


def test_a_run_with_ports_validates_and_comes_back_and_an_older_report_still_loads(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(COMMITTED.read_text()))
    for run in (dlora(), dlora({20: (0, 3), 30: ()}, idle="park", left_edge=True)):
        run.save(tmp_path)
        assert RunReport.load(tmp_path) == run
        document = written(tmp_path / "run.json")
        validator.validate(document)
        assert not validator.is_valid(document | {"ports": document["ports"] | {"kind": "tap"}})
    del document["ports"], document["dropout"]
    (tmp_path / "run.json").write_text(json.dumps(document))
    older = RunReport.load(tmp_path)
    assert (older.ports, older.dropout) == (None, None)


def test_settings_that_decide_a_run_come_back_and_a_report_without_them_still_loads(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(COMMITTED.read_text()))
    for chosen in (settings(), settings(targets=None, alpha=None, dropout=None)):
        report(settings=chosen).save(tmp_path)
        assert RunReport.load(tmp_path).settings == chosen
        validator.validate(written(tmp_path / "run.json"))
    document = written(tmp_path / "run.json")
    del document["settings"]
    (tmp_path / "run.json").write_text(json.dumps(document))
    assert RunReport.load(tmp_path).settings is None


def test_decisions_ascend_and_name_ports_that_there_are_in_blocks_that_are_theirs() -> None:
    for steps in ((20, 20), (30, 20)):
        decisions = tuple(Decision(step=step, alive=()) for step in steps)
        with pytest.raises(ValidationError, match="do not ascend"):
            KillRevive(**(dict(ports({}).kill_revive or ()) | {"decisions": decisions}))
    with pytest.raises(ValidationError, match="beyond the 4 there are"):
        ports({20: (0,), 30: (3, 4)})
    own = dict(ports())
    for blocks in (own["blocks"][:1], own["blocks"][::-1], (*own["blocks"], own["blocks"][1])):
        with pytest.raises(ValidationError, match="not those of the ports"):
            Ports(**(own | {"blocks": blocks}))


@pytest.mark.parametrize("name", ["", "9", "q_proj", "9.", "-1.q", "09.q", "9.q-proj", "9.q v", "9.q\n"])
def test_a_port_is_named_by_block_and_module(name: str) -> None:
    own = dict(ports().ports[0])
    with pytest.raises(ValidationError):
        PortCost(**(own | {"name": name}))
    assert PortCost(**(own | {"name": "10.self_attn.q_proj"})).block == 10


def test_the_published_schema_is_current() -> None:
    assert json.loads(COMMITTED.read_text()) == json_schema(), "write json_schema() to docs/run.schema.json"


def test_a_report_cannot_be_changed_nor_hold_what_is_no_figure() -> None:
    with pytest.raises(ValidationError):
        report().steps = 3
    wrong: list[dict[str, Any]] = [{"steps": -1}, {"steps": True}, {"steps": "3"}, {"final_loss": float("nan")}]
    for fields in (*wrong, {"surprise": 1}, {"started": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1)))}):
        with pytest.raises(ValidationError):
            report(**fields)
    with pytest.raises(ValidationError):
        Score(loss=0.0, accuracy=1.5)
    with pytest.raises(ValidationError):
        Tokens(real=1.0, padded=1)  # type: ignore[arg-type]


def test_counts_cannot_be_called_equal_when_they_differ() -> None:
    edge, cloud = SideCount(sent_bytes=1, received_bytes=2), SideCount(sent_bytes=1, received_bytes=2)
    with pytest.raises(ValidationError, match="contradicts"):
        Agreement(edge=edge, cloud=cloud, equal=True, unchecked_streams=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "says no schema"),
        (b'{"schema": "isthmus-run/2"}', "schema 'isthmus-run/2'.*reads 'isthmus-run/1'"),
        (b'{"schema": "isthmus-run/1"}', "method: Field required"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunError, match=message) as refusal:
        RunReport.load(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_missing_report_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.json does not exist"):
        RunReport.load(tmp_path)
    with pytest.raises(RunError, match="nowhere does not exist"):
        RunReport.load(tmp_path / "nowhere")


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(seed=1).save(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        report(seed=2).save(tmp_path)
    assert RunReport.load(tmp_path).seed == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_the_cost_block_is_the_training_steps_and_every_phases_bytes() -> None:
    ledger = Ledger()
    ledger.add("fetch", down_bytes=900, down_payload_bytes=890)
    ledger.add("train", up_bytes=100, up_payload_bytes=90, down_bytes=60, down_payload_bytes=55, round_trips=2)
    ledger.add("train", resent_bytes=7, recomputed_calls=1, edge_forward_flops=11, edge_wait_s=0.25, cloud_queue_s=0)
    ledger.add("train", cloud_forward_flops=13, cloud_recompute_flops=4, cloud_backward_flops=0)
    ledger.add("eval", up_bytes=30, round_trips=5, edge_forward_flops=1000)
    ledger.peak("cloud_peak_tensor_bytes", 77)
    cost = from_ledger(ledger)
    assert (cost.wire.up_bytes, cost.wire.down_bytes, cost.wire.overhead_bytes) == (100, 60, 15)
    assert (cost.wire.round_trips, cost.wire.resent_bytes) == (2, 7)
    assert (cost.wire.by_phase.fetch.down_bytes, cost.wire.by_phase.eval.up_bytes) == (900, 30)
    assert (cost.edge.forward_flops, cost.edge.wait_s) == (11, 0.25)
    assert (cost.cloud.forward_flops, cost.cloud.recompute_flops, cost.cloud.recomputed_calls) == (13, 4, 1)
    assert (cost.cloud.backward_flops, cost.cloud.queue_s, cost.cloud.peak_tensor_bytes) == (0, 0, 77)


def test_what_nobody_counted_is_null_and_never_a_guess() -> None:
    cost = from_ledger(Ledger())
    assert set(cost.edge.model_dump().values()) == set(cost.cloud.model_dump().values()) == {None}
    assert cost.wire.up_bytes == 0


def test_the_cache_block_is_what_training_and_scoring_took_from_it_and_null_without_one() -> None:
    ledger = Ledger()
    ledger.add("train", real_tokens=9)
    assert from_ledger(ledger).wire.cache is None
    ledger.add("eval", cached_rows=0, fetched_rows=4)
    scored = CacheUse(cached_rows=0, fetched_rows=4)
    assert from_ledger(ledger).wire.cache == Cache(train=CacheUse(cached_rows=0, fetched_rows=0), eval=scored)
    ledger.add("train", cached_rows=7)
    assert from_ledger(ledger).wire.cache == Cache(train=CacheUse(cached_rows=7, fetched_rows=0), eval=scored)


def test_ports_and_blocks_cost_what_the_ledger_holds_at_their_places_in_training() -> None:
    ledger = Ledger()
    ledger.add("train", up_bytes=9_999, edge_forward_flops=8_888)
    ledger.add("train", at="10", up_bytes=70, round_trips=3)
    ledger.add("train", at="9", up_bytes=5, down_bytes=6)
    ledger.add("train", at="9.mlp.up_proj", edge_forward_flops=11, edge_backward_flops=22)
    ledger.add("eval", at="9.mlp.up_proj", edge_forward_flops=1_000)
    ledger.add("eval", at="9", up_bytes=1_000)
    names = ["10.q", "9.mlp.up_proj", "9.q"]
    costs, blocks = port_costs(ledger, names, {"10.q": 7, "9.q": 8}, {"9.q": 2})
    assert [(port.name, port.trained_steps, port.probed_steps) for port in costs] == [
        ("10.q", 7, 0),
        ("9.mlp.up_proj", 0, 0),
        ("9.q", 8, 2),
    ]
    assert [(port.edge_forward_flops, port.edge_backward_flops) for port in costs] == [(0, 0), (11, 22), (0, 0)]
    assert blocks == (
        BlockCost(block=9, up_bytes=5, down_bytes=6, round_trips=0),
        BlockCost(block=10, up_bytes=70, down_bytes=0, round_trips=3),
    )
    assert Ports(kind="lora", ports=costs, blocks=blocks, kill_revive=None).ports == costs
