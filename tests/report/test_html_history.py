"""What a run did step by step is read as it was written, whether the run ended well, was killed, or went on."""

import json
import statistics
from pathlib import Path

import pytest

from isthmus.errors import RunError
from isthmus.ledger.record import Ledger
from isthmus.report.curves import MOST_POINTS, curve, scored
from isthmus.report.history import History
from isthmus.report.median_step import median_step
from isthmus.report.port_map import ALIVE, IDLE, PROBED, port_map
from tests.report.by_hand import DOWN, SECONDS, UP, loss_at, metrics, spend, write_steps
from tests.report.example import costing, dlora, report
from tests.report.offsite_example import EMULATED, PLUGGED, TUNED, offsite


def test_torn_last_lines_are_left_out_and_left_alone(tmp_path: Path) -> None:
    write_steps(tmp_path, 5)
    whole = History.read(tmp_path)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 6, "phase": "train", "up_by')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert History.read(tmp_path) == whole
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", '{"step": 1}'),
        ("metrics.jsonl", "nonsense"),
        ("ledger.jsonl", '{"step": 1, "phase": "train", "up_bytes": -1}'),
        ("ledger.jsonl", '{"step": 1, "phase": "lunch"}'),
        ("ledger.jsonl", '{"phase": "train"}'),
        ("ledger.jsonl", '{"step": 1, "phase": "train", "places": 3}'),
        ("ledger.jsonl", "[]"),
        ("ledger.jsonl", "nonsense"),
    ],
)
def test_a_whole_line_that_makes_no_sense_is_refused_with_its_place(tmp_path: Path, name: str, line: str) -> None:
    write_steps(tmp_path, 2)
    lines = (tmp_path / name).read_text().splitlines()
    (tmp_path / name).write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(RunError, match=f"{name}:2: not a line of"):
        History.read(tmp_path)


def test_a_directory_without_the_files_has_no_history(tmp_path: Path) -> None:
    assert History.read(tmp_path) == History()


def test_the_ledger_adds_up_as_the_one_that_wrote_it(tmp_path: Path) -> None:
    write_steps(tmp_path, 7)
    mine, theirs = History.read(tmp_path).ledger, Ledger.resume(tmp_path / "ledger.jsonl")
    for phase in ("fetch", "train", "eval"):
        assert mine.totals(phase) == theirs.totals(phase)  # type: ignore[arg-type]
        assert mine.places(phase) == theirs.places(phase)  # type: ignore[arg-type]
    assert mine.peaks() == theirs.peaks() == {"edge_peak_memory_bytes": 5_000_000}


def test_steps_done_again_cost_twice_and_count_as_they_were_done_last(tmp_path: Path) -> None:
    write_steps(tmp_path, 6)
    ledger = Ledger.resume(tmp_path / "ledger.jsonl")
    ledger.add("train", up_bytes=7)  # what came late, after the resumed run's step 4 was due again
    ledger.close_step(4)
    spend(ledger, 5)
    history = History.read(tmp_path)
    assert list(history.steps) == [1, 2, 3, 4, 5]
    assert history.steps[5].figures["up_bytes"] == UP + 40
    ups = [UP + 10 * each for each in (0, 1, 2, 3, 4, 5, 4)]
    assert history.crossed[5] == (sum(ups) + 7, sum(DOWN - UP + up for up in ups))
    assert history.ledger.total("train", "up_bytes") == sum(ups) + 7


def test_what_came_late_is_part_of_its_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    spend(ledger, 1, ("9.q",))
    ledger.add("train", up_bytes=5, round_trips=1)
    ledger.add("train", at="9.q", edge_forward_flops=3)
    ledger.close_step(1)
    spent = History.read(tmp_path).steps[1]
    assert spent.figures["up_bytes"] == UP + 5
    assert spent.figures["real_tokens"] == 100
    assert spent.places["9.q"] == {"edge_forward_flops": 1_003}


def test_the_median_step_is_the_one_in_the_middle_by_the_clock(tmp_path: Path) -> None:
    write_steps(tmp_path, 25)
    found = median_step(History.read(tmp_path))
    assert found is not None
    assert found.seconds == pytest.approx(statistics.median(SECONDS * 5))
    assert found.step == SECONDS.index(0.6) + 1


def test_both_sides_seconds_of_the_median_step_come_to_the_clocks(tmp_path: Path) -> None:
    write_steps(tmp_path, 25)
    found = median_step(History.read(tmp_path))
    assert found is not None
    edge = {part.kind: part.seconds for part in found.edge}
    cloud = {part.kind: part.seconds for part in found.cloud}
    # 0.6 s: 0.1, 0.15 and 0.02 are computed on the edge, 0.32 waited, of which 0.1 are the cloud's, 0.01 are nobody's.
    assert edge == pytest.approx(
        {
            "forward": 0.1,
            "backward": 0.15,
            "update": 0.02,
            "cloud": 0.09,
            "queue": 0.01,
            "link": 0.22,
            "rest": 0.01,
        }
    )
    assert cloud == pytest.approx({"forward": 0.05, "backward": 0.04, "queue": 0.01, "rest": 0.5})
    assert (sum(edge.values()), sum(cloud.values())) == pytest.approx((0.6, 0.6))


def test_a_run_without_a_cloud_has_one_side_and_one_without_metrics_no_clock(tmp_path: Path) -> None:
    write_steps(tmp_path, 3, wire=False)
    (tmp_path / "metrics.jsonl").unlink()
    found = median_step(History.read(tmp_path))
    assert found is not None
    assert (found.cloud, found.seconds) == ((), None)
    assert {part.kind: part.seconds for part in found.edge} == pytest.approx(
        {"forward": 0.1, "backward": 0.15, "update": 0.02}
    )
    assert median_step(History()) is None


def test_a_curve_is_the_loss_of_each_step_over_what_had_crossed(tmp_path: Path) -> None:
    write_steps(tmp_path, 19)
    found = curve(report(), History.read(tmp_path))
    assert found is not None
    assert found.steps == tuple(range(1, 20))
    assert found.loss == found.smoothed == tuple(loss_at(step) for step in range(1, 20))
    assert found.crossed[0] == UP + DOWN
    assert found.crossed[2] == 3 * (UP + DOWN) + 2 * (10 + 20)


def test_a_long_curve_is_thinned_to_means_that_keep_its_mean(tmp_path: Path) -> None:
    lines = metrics(3 * MOST_POINTS)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = curve(report(), History.read(tmp_path))
    assert found is not None
    assert (len(found.loss), found.together, found.window) == (MOST_POINTS, 3, 50)
    assert statistics.fmean(found.loss) == pytest.approx(statistics.fmean(line["loss"] for line in lines))
    assert found.smoothed[60] == pytest.approx(statistics.fmean(line["loss"] for line in lines[33:183]))


def test_scores_stand_where_they_were_taken_and_an_emulators_begin_with_its_bundle() -> None:
    wired = scored(costing(report(), wire={"up_bytes": 300, "down_bytes": 700}), History())
    assert [(each.step, each.crossed, each.accuracy) for each in wired] == [(0, 0, 0.801), (120, 1_000, 0.874)]
    on_emulator = scored(offsite(EMULATED, TUNED), History(), PLUGGED)
    assert [(each.step, each.emulated, each.crossed) for each in on_emulator] == [
        (0, True, 160_000_000),
        (100, True, 160_000_000),
        (100, False, 160_000_000),
    ]
    assert on_emulator[-1].accuracy == PLUGGED.accuracy


def test_the_map_shows_what_lived_between_decisions_and_what_was_only_measured(tmp_path: Path) -> None:
    run = dlora({2: (0,), 5: (3,)}, steps=7)
    assert run.ports is not None
    names = [port.name for port in run.ports.ports]
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step in range(1, 8):
        alive = names if step <= 2 else [names[0], *([names[2]] if step == 5 else [])] if step <= 5 else [names[3]]
        spend(ledger, step, tuple(alive))
    found = port_map(run, History.read(tmp_path))
    assert found is not None
    assert (found.names, found.ends) == (tuple(names), (2, 4, 5, 7))
    assert found.states == (
        (ALIVE, ALIVE, ALIVE, IDLE),
        (ALIVE, IDLE, IDLE, IDLE),
        (ALIVE, IDLE, PROBED, IDLE),
        (ALIVE, IDLE, IDLE, ALIVE),
    )
    assert port_map(dlora(None), History()) is port_map(report(), History()) is None
