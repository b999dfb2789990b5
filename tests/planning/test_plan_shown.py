"""What a plan prints: tables of 80 columns, JSON by its schema, and sentences that say which limit is in the way.

Costs are made by hand here, so that what is shown can be told from what is planned.
"""

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from edge_client.plan_devices import PROCESS
from edge_client.plan_json import schema
from edge_client.plan_making import Made, configuration_of, make
from edge_client.plan_report import report_of
from edge_client.plan_settings import PlanSettings
from edge_client.plan_tables import compared, detailed, duration
from edge_client.plan_words import impossible, made_for, over_limits, why
from isthmus.errors import DataError, UsageError
from isthmus.planning.fit import Limits, fit
from tests.harness import save_tiny_model, write_rows
from tests.planning.plans_by_hand import costs_by_hand, plan

SCHEMA = Path(__file__).parents[2] / "docs" / "plan.schema.json"
NOWHERE = Console(file=io.StringIO())


def made(**flags: Any) -> tuple[PlanSettings, Made]:
    settings = PlanSettings.read(None, {"model": "gpt2", **flags})
    return settings, make(settings, configuration_of(settings), costs_by_hand, NOWHERE)


def printed(*shown: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    for one in shown:
        console.print(one)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_without_a_method_all_stand_side_by_side_in_80_columns() -> None:
    _, done = made(link="4g")
    lines = printed(compared(done.plans, done.refused))
    names = ["split", "split, int8", "split, top", "side", "dlora", "parameters"]
    names += ["dlora, 12.5 %", "core", "offsite", "local"]
    assert [plan.name for plan in done.plans] == names
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    for name in names:
        assert sum(line.startswith(f"{name} ") for line in lines) >= 2, name


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_the_longest_names_and_figures_stand_in_80_columns_too(codec: str) -> None:
    _, done = made(codec=codec, link="4g", length=1000, rows=100_000, epochs=30.0)
    lines = printed(compared(done.plans, done.refused))
    assert max(len(plan.name) for plan in done.plans) == 19
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "refused", "said"),
    [
        ({"codec_gradient": "int8"}, ["split, top"], "no gradient crosses in such a run"),
        ({"exchange": "activations", "peft": "ia3"}, ["local"], "trains LoRA in all blocks"),
        ({"kr_period": 3, "codec": "bf16"}, [], ""),
    ],
)
def test_a_way_that_a_flag_misfits_is_left_out_with_its_reason_and_the_others_are_planned(
    flags: dict[str, Any], refused: list[str], said: str
) -> None:
    _, done = made(**flags)
    assert list(done.refused) == refused
    assert all(said in reason for reason in done.refused.values())
    assert {plan.name for plan in done.plans}.isdisjoint(refused)
    assert len(done.plans) >= 6


def test_a_flag_that_misfits_every_way_is_refused_with_the_first_reason() -> None:
    with pytest.raises(UsageError, match="--steps and --epochs contradict"):
        made(steps=3, epochs=2.0)


def test_figures_that_do_not_exist_are_dashes_and_later_epochs_stand_where_they_are_cheaper() -> None:
    _, done = made()
    lines = printed(compared(done.plans, {}))
    offsite = next(line for line in lines if line.startswith("offsite"))
    assert offsite.split()[1:4] == ["-", "-", "-"]
    later = [number for number, line in enumerate(lines) if line.startswith("  later epochs")]
    assert [lines[number - 1].split("  ")[0] for number in later] == ["split, top", "side"]


def test_one_method_is_shown_with_all_that_makes_up_its_step() -> None:
    _, done = made(method="dlora", kr_active=0.25, microbatches=2, batch_size=4)
    only = done.plans[0]
    lines = printed(detailed(only))
    assert max(map(len, lines)) <= 80
    told = {line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[1].strip() for line in lines if "  " in line.strip()}
    assert told["Parameters that train"] == f"{only.costs.trained.adapter:,}"
    assert told["round trips"] == duration(only.first.latency)
    assert told["of these at once"].startswith("-")
    assert "checkpoints, two kept" in told


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0123, "12.3 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (99.0, "99 s"),
        (600.0, "10 min"),
        (36000.0, "10 h"),
        (864000.0, "10 d"),
        (999.7 * 86400, "1,000 d"),
        (1000.4 * 86400, "1,000 d"),
        (12345.6 * 86400, "12,346 d"),
    ],
)
def test_seconds_are_told_in_the_unit_that_reads_best(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_what_a_run_comes_to_is_its_fetching_and_all_of_its_steps() -> None:
    _, done = made(method="split", train="top", epochs=3.0, rows=80, length=100)
    only = done.plans[0]
    assert (only.steps, only.steps_per_epoch) == (30, 10)
    first = only.costs.first.crossing
    assert only.crossing.up_bytes == pytest.approx(100 + 10 * first.up_bytes)  # silent after the first epoch
    assert only.total_s == pytest.approx(only.fetch_s + 10 * only.first.total + 20 * only.later.total)


def test_without_rows_every_step_sees_new_ones() -> None:
    _, done = made(method="split", train="top", steps=30)
    assert done.plans[0].crossing.up_bytes == pytest.approx(100 + 30 * done.plans[0].costs.first.crossing.up_bytes)
    settings, _ = made(steps=30)
    assert report_of(settings, done, Limits()).rows.rows is None


@pytest.mark.parametrize("flags", [{}, {"method": "side"}, {"fit": True, "max_bytes": "40MB"}])
def test_json_is_by_its_schema_and_has_the_figures_that_are_shown(flags: dict[str, Any]) -> None:
    settings, done = made(rows=100, **flags)
    limits = done.place.limits(settings)
    told = json.loads(report_of(settings, done, limits).model_dump_json())
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(told)
    first = told["plans"][0]
    assert first["run"]["hours"] == done.plans[0].hours
    assert first["costs"]["first"]["crossing"]["up_bytes"] == done.plans[0].costs.first.crossing.up_bytes
    assert (told["fit"] is not None) == settings.fit


def test_the_schema_is_current() -> None:
    assert json.loads(SCHEMA.read_text()) == schema(), f"write it anew: {SCHEMA}"


def test_plans_that_break_a_limit_are_named() -> None:
    settings, done = made(max_bytes="40MB", rows=100)
    said = over_limits(done.plans, done.place.limits(settings))
    assert len(said) == 1
    assert said[0].startswith("over --max-bytes 40.0MB: ")
    over = {plan.name for plan in done.plans if plan.total_bytes > 40e6}
    assert set(said[0].partition(": ")[2].split(", ")) >= {"dlora"}
    assert all(name in said[0] for name in over)
    assert "offsite" not in said[0]


def test_a_limit_that_binds_is_said_and_what_it_keeps_from_being_taken() -> None:
    settings, done = made(fit=True, rows=100, max_bytes="40MB", max_hours=1000.0)
    assert done.fitted is not None
    assert done.plans[0].total_bytes <= 40e6
    said = why(done.fitted, done.place.limits(settings))
    assert any(line.startswith("--max-bytes binds: without it dlora") for line in said)
    assert not any(line.startswith("--max-hours binds") for line in said)


def test_a_device_that_is_named_limits_memory() -> None:
    settings, done = made(edge="pi-4")
    memory = done.place.edge.memory_bytes
    assert memory is not None
    assert done.place.limits(settings).edge_memory == memory - PROCESS
    settings, done = made(edge="pi-4", edge_memory="1GB")
    assert done.place.limits(settings).edge_memory == 10**9


def test_an_impossible_limit_is_said_with_how_much_is_missing() -> None:
    _, done = made(fit=True, rows=100, max_bytes="1MB")
    assert done.fitted is not None
    said = impossible(done.fitted, Limits(max_bytes=1_000_000))
    assert done.plans == ()
    assert said.startswith("--max-bytes 1.00MB is 5 times too small: the least that any of ")
    assert said.endswith("takes is 5.00 MB (offsite, cut 4:4)")
    assert "\n" not in said


def test_limits_that_nothing_keeps_together_are_said_with_what_comes_nearest() -> None:
    lean, quick = plan("lean", size=5e6, hours=40.0), plan("quick", size=30e6, hours=5.0)
    limits = Limits(max_bytes=10_000_000, max_hours=10.0)
    said = impossible(fit([[lean], [quick]], limits), limits)
    assert "not all together" in said
    assert "quick (cut 2:2), takes 3 times --max-bytes 10.0MB (30.0 MB)" in said


def test_speeds_that_are_told_stand_in_place_of_a_device(tmp_path: Path) -> None:
    _, slow = made(method="local", edge_tflops=0.1)
    _, quick = made(method="local", edge_tflops=0.2)
    assert slow.plans[0].first.edge > 1.5 * quick.plans[0].first.edge
    settings, done = made(link="100:10:20", edge_tflops=0.25)
    said = made_for(settings, done.rows, done.place)
    assert "100 ms a round trip, 10 Mbit/s up, 20 down" in said[0]
    assert "250 GFLOP/s" in said[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"link": "pigeon"}, "--link"),
        ({"edge": "toaster"}, "--edge: no device is called 'toaster'"),
        ({"cloud": "toaster"}, "--cloud: no device"),
        ({"length": 2000}, "--length 2000 is more than the 1024 tokens"),
        ({"calibration": Path("/nowhere.json")}, "--calibration"),
        ({"method": "offsite", "emulator": "half"}, "--emulator 'half' is no folder"),
        ({"method": "offsite", "emulator": "drop:1.5"}, "--keep 1.5"),
        ({"data": Path("rows.jsonl")}, "has none beside its configuration"),
    ],
)
def test_what_cannot_be_planned_with_is_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        made(**flags)
    assert said in str(raised.value)


@pytest.mark.parametrize("emulator", ["drop:0.5", "drop:3", "share:0.5:4", "rank:0.5", "quant:8"])
def test_emulators_that_might_be_built_can_be_planned_with(emulator: str) -> None:
    _, done = made(method="offsite", emulator=emulator)
    assert done.plans[0].crossing.round_trips == 1


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Callable[[], str]:
    def saved() -> str:
        save_tiny_model(tmp_path / "model", "llama")
        write_rows(tmp_path / "rows.jsonl")
        return str(tmp_path / "model")

    return saved


def test_rows_of_a_file_have_the_lengths_that_the_tokenizer_gives(
    with_tokenizer: Callable[[], str], tmp_path: Path
) -> None:
    settings, done = made(model=with_tokenizer(), data=tmp_path / "rows.jsonl", method="split", cut="1:1")
    count = len((tmp_path / "rows.jsonl").read_text().split("\n")) - 1
    assert len(done.rows.lengths) == count
    assert len(set(done.rows.lengths)) > 1
    assert all(learnt <= length for learnt, length in zip(done.rows.losses, done.rows.lengths, strict=True))
    batches = done.rows.workloads(settings.configured({}))
    times = dict.fromkeys(done.rows.lengths, 0.0)
    for batch, count in batches.items():
        for length in batch.lengths:
            times[length] += count
    assert times == Counter(done.rows.lengths)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        made(model=str(tmp_path / "model"), data=tmp_path / "rows.jsonl")
