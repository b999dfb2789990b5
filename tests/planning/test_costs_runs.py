"""What is planned is what runs cost: bytes, round trips and operations within 1 %, whatever trains and crosses."""

import io

import pytest
from rich.console import Console

from edge_client.plan_costs import CostsOfRuns
from edge_client.plan_making import make
from edge_client.plan_settings import PlanSettings
from edge_client.planned import Planned
from isthmus.planning.configurations import beside, find
from isthmus.planning.figures import Step
from tests.planning.runs import BATCH, CASES, Case, Made, Runs

WITHIN = 0.01


def planned(made: Made) -> Planned:
    return Planned(made.settings, made.configuration, "float32", made.emulator, made.beside)


def whole(plan: Planned, made: Made) -> Step:
    """All steps together, each with the rows that it had."""
    first = -(-made.workloads[0].rows // made.settings.batch_size)
    total = Step()
    for number, workload in enumerate(made.workloads):
        costs = plan.costs(workload)
        total += costs.first if number < first else costs.later
    return total


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_costs_what_was_planned(case: Case, runs: Runs) -> None:
    made = runs.of(case)
    plan = planned(made)
    step, spent = whole(plan, made), made.report.cost
    foreseen = {
        "up": step.crossing.up_bytes,
        "down": step.crossing.down_bytes,
        "round trips": step.crossing.round_trips,
        "edge forward": step.edge.forward,
        "edge backward": step.edge.backward,
        "cloud forward": step.cloud.forward,
        "cloud backward": step.cloud.backward,
        "fetch up": plan.costs(made.workloads[0]).fetch.up_bytes,
        "fetch down": plan.costs(made.workloads[0]).fetch.down_bytes,
    }
    measured = {
        "up": spent.wire.up_bytes,
        "down": spent.wire.down_bytes,
        "round trips": spent.wire.round_trips,
        "edge forward": spent.edge.forward_flops,
        "edge backward": spent.edge.backward_flops,
        "cloud forward": spent.cloud.forward_flops or 0,
        "cloud backward": spent.cloud.backward_flops or 0,
        "fetch up": made.spent("fetch", "up_bytes")[0],
        "fetch down": made.spent("fetch", "down_bytes")[0],
    }
    assert foreseen == pytest.approx(measured, rel=WITHIN)
    assert measured["edge backward"] > 0
    assert plan.costs(made.workloads[0]).trained.total == made.report.params.trainable


@pytest.mark.parametrize("name", ["split", "split-topmost", "top", "side", "dlora"])
def test_a_run_costs_what_was_planned_from_the_rows_of_its_data(name: str, runs: Runs) -> None:
    case = next(case for case in CASES if case.name == name)
    made = runs.of(case)
    told = {"cut": case.cut, "batch_size": BATCH, "steps": made.settings.steps, **case.settings}
    model = str(runs.models[case.family])
    settings = PlanSettings.read(None, {"model": model, "data": made.settings.data, **told})
    costs_of = CostsOfRuns(made.configuration, "float32", beside(find(model)))
    plan = make(settings, made.configuration, costs_of, Console(file=io.StringIO())).plans[0]
    spent, step = made.report.cost, plan.training
    measured = (spent.wire.up_bytes, spent.wire.down_bytes, spent.wire.round_trips, spent.edge.forward_flops)
    crossing = step.crossing
    foreseen = (crossing.up_bytes, crossing.down_bytes, crossing.round_trips, step.edge.forward)
    assert foreseen == pytest.approx(measured, rel=WITHIN)
    fetched = plan.costs.fetch
    assert (fetched.up_bytes, fetched.down_bytes) == pytest.approx(
        made.spent("fetch", "up_bytes", "down_bytes"), rel=WITHIN
    )
