"""Rows of a plan: few batches stand for all, short ones are no full ones, and rows that are alike take no room."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from edge_client.config import TrainConfig
from edge_client.plan_costs import CostsOfRuns
from edge_client.plan_making import configuration_of, make
from edge_client.plan_rows import PlannedRows
from edge_client.plan_settings import PlanSettings
from edge_client.plan_ways import command_of
from isthmus.planning.plan import Plan, mean_costs
from isthmus.planning.workload import Workload
from isthmus.training.batches import epoch_batches
from tests.harness import save_tiny_model
from tests.planning.plans_by_hand import costs_by_hand
from tests.planning.test_plan_settings import config_of
from tests.planning.test_plan_shown import NOWHERE, made


def told(**run: object) -> TrainConfig:
    return PlanSettings.read(None, {"model": "gpt2", "method": "split", **run}).configured({})


def some_long() -> tuple[int, ...]:
    lengths = [400] * 400 + [16] * 3600
    random.Random(0).shuffle(lengths)
    return tuple(lengths)


def spread() -> tuple[int, ...]:
    return tuple(min(500, 8 + int(random.Random(row).lognormvariate(3, 1))) for row in range(797))


def batches(rows: PlannedRows, config: TrainConfig) -> Counter[Workload]:
    """All of an epoch, each with how often it is there."""
    found = epoch_batches(rows.lengths, config.batch_size, config.seed, 0)
    lengths, losses = rows.lengths, rows.losses
    return Counter(Workload(tuple(lengths[n] for n in one), tuple(losses[n] for n in one), rows.count) for one in found)


@pytest.mark.parametrize("lengths", [some_long(), spread()], ids=["some-long", "spread"])
def test_few_batches_cost_what_all_of_them_cost_and_hold_what_the_longest_holds(
    lengths: tuple[int, ...], tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model", "llama")
    model, config = str(tmp_path / "model"), told(cut="1:1", train="top")
    costs_of = CostsOfRuns(configuration_of(PlanSettings.read(None, {"model": model})), "float32")
    rows = PlannedRows(lengths, tuple(length - 1 for length in lengths), len(lengths), known=True)
    few, every = rows.workloads(config), batches(rows, config)
    assert len(few) <= 28 < sum(every.values())
    found, true = (mean_costs(costs_of(config, list(some), None), some) for some in (few, every))
    assert found.first.crossing.up_bytes == pytest.approx(true.first.crossing.up_bytes, rel=0.001)
    assert found.first.crossing.down_bytes == pytest.approx(true.first.crossing.down_bytes, rel=0.001)
    assert found.first.edge.forward == pytest.approx(true.first.edge.forward, rel=0.05)
    assert found.first.cloud.forward == pytest.approx(true.first.cloud.forward, rel=0.05)
    assert found.storage.cache == pytest.approx(true.storage.cache, rel=0.01)
    assert found.edge_peak_tensor_bytes == true.edge_peak_tensor_bytes
    assert found.cloud_peak_tensor_bytes == true.cloud_peak_tensor_bytes


def test_the_batch_with_most_to_learn_is_among_those_looked_at() -> None:
    lengths = tuple(50 + number % 40 for number in range(800))
    losses = tuple(40 if number == 17 else 1 for number in range(800))
    rows, config = PlannedRows(lengths, losses, 800, known=True), told(batch_size=1)
    assert max(sum(one.losses) for one in rows.workloads(config)) == 40


@pytest.mark.parametrize("lengths", [(100,) * 800, spread()], ids=["of-one-length", "spread"])
def test_few_batches_have_the_tokens_of_all_run_and_learnt(lengths: tuple[int, ...]) -> None:
    losses = tuple(random.Random(number).randrange(1, length) for number, length in enumerate(lengths))
    found = PlannedRows(lengths, losses, len(lengths), known=True).workloads(told())
    assert min(found.values()) >= 0
    assert sum(times * sum(one.lengths) for one, times in found.items()) == pytest.approx(sum(lengths))
    assert sum(times * sum(one.losses) for one, times in found.items()) == pytest.approx(sum(losses))


def test_a_run_that_ends_early_is_planned_by_the_batches_that_it_meets() -> None:
    rows, config = PlannedRows(some_long(), (15,) * 4000, 4000, known=True), told(steps=3)
    first = epoch_batches(rows.lengths, config.batch_size, config.seed, 0)[:3]
    met = sum(rows.lengths[row] for batch in first for row in batch)
    assert sum(times * sum(one.lengths) for one, times in rows.workloads(config).items()) == pytest.approx(met)


def planned(**flags: object) -> Plan:
    return made(method="split", **flags)[1].plans[0]


def test_a_short_last_batch_is_no_full_one() -> None:
    tokens = {rows: planned(rows=rows, length=100).training.crossing.up_bytes / 100 for rows in (3, 8, 9, 16)}
    assert tokens[9] == pytest.approx(9 / 16 * tokens[16])
    assert tokens[3] == pytest.approx(3 / 8 * tokens[8])


def test_microbatches_are_no_more_than_the_rows_of_a_batch() -> None:
    one, many = (planned(batch_size=2, length=100, microbatches=parts, link="100:10:10") for parts in (2, 8))
    assert one.costs.first.edge == many.costs.first.edge
    assert many.first.edge == one.first.edge
    assert planned(batch_size=4, length=100, microbatches=4).first.edge > planned(batch_size=4, length=100).first.edge


def test_more_rows_than_memory_holds_can_be_planned(tmp_path: Path) -> None:
    plan = planned(tokens=15_000_000_000_000, length=100)
    assert plan.steps == 15_000_000_000_000 // 800


def test_of_more_rows_than_steps_meet_those_are_kept_that_are_met(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama")
    kept = []
    for rows, steps in [(1000, 10), (80, 10), (80, 40), (160, 20)]:
        flags = {"model": str(tmp_path / "model"), "method": "split", "train": "top", "cut": "1:1", "length": 20}
        settings = PlanSettings.read(None, {**flags, "rows": rows, "steps": steps})
        configuration = configuration_of(settings)
        done = make(settings, configuration, CostsOfRuns(configuration, "float32"), NOWHERE)
        kept.append(done.plans[0].costs.storage.cache)
    assert kept[0] == kept[1] == kept[2] > 0
    assert kept[3] == 2 * kept[0]


def test_a_mean_is_over_all_batches_and_a_peak_over_any() -> None:
    config = told(cut="1:1")
    short, long, none = (Workload((length,) * rows, (1,) * rows) for length, rows in [(10, 4), (40, 4), (90, 4)])
    costs = costs_by_hand(config, [short, long, none], None)
    mean = mean_costs(costs, {short: 3.0, long: 1.0, none: 0.0})
    up = [one.first.crossing.up_bytes for one in costs]
    assert mean.first.crossing.up_bytes == pytest.approx((3 * up[0] + up[1]) / 4)
    assert mean.edge_peak_tensor_bytes == costs[2].edge_peak_tensor_bytes


@pytest.mark.parametrize("flags", [{"length": 512}, {"length": 700}, {"max_length": 90}])
def test_the_printed_command_runs_rows_as_long_as_were_planned(flags: dict[str, int], tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "long " * 200}) + "\n")
    asked = PlanSettings.read(None, {"model": "llama-3-8b", "method": "split", **flags})
    kept = config_of(command_of(asked.configured({})), "split").max_length
    of_data = {"model": str(tmp_path / "model"), "data": tmp_path / "rows.jsonl", "max_length": kept}
    settings = PlanSettings.read(None, of_data)
    assert PlannedRows.of(settings, configuration_of(settings)).lengths == (asked.asked_length,)
