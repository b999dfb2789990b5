"""What was measured is told apart into rates and fixed costs, kept in a file, and read again or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import UsageError
from isthmus.planning.calibration import GAINED, Calibration, Line, Measured, read, speed_at
from isthmus.planning.fitting import Timed, not_negative, pass_speed, undisturbed
from isthmus.planning.links import Link
from isthmus.planning.machines import PassSpeed, Speed
from isthmus.planning.seconds import Handling

TRUE = PassSpeed(flops=5e10, head_flops=2e10, block_s=0.002, call_s=0.003)
SIZES = ((1, 1e7, 1e6), (3, 2e8, 1e6), (3, 5e9, 4e6), (1, 1e9, 9e8), (3, 3e10, 0))


def timed(true: PassSpeed, off: float = 0.0) -> list[Timed]:
    """Passes of a device with a known speed; every other one is `off` too slow, in proportion."""
    return [
        Timed(blocks, flops, head, (1 + off * (number % 2)) * true.seconds(1, blocks, flops, head))
        for number, (blocks, flops, head) in enumerate(SIZES)
    ]


def speed(flops: float, block_s: float = 0.01) -> Speed:
    one = PassSpeed(flops=flops, head_flops=2 * flops, block_s=block_s, call_s=0.0)
    return Speed(forward=one, backward=one, update_s=0.1, value_s=1e-8)


def calibration(**changes: Any) -> Calibration:
    given = {
        "schema": "isthmus-calibration/1",
        "device": "a processor",
        "memory_bytes": 8_000_000_000,
        "model": Measured(model_type="llama", hidden_size=64, dtype="float32"),
        "speeds": {1: speed(1e9), 4: speed(3e9)},
        "line": Line(round_trip_s=0.02, up=1e6, down=2e6),
        "cloud_speed": speed(1e11),
        "handling": Handling(request_s=0.001, byte_s=1e-9),
    }
    return Calibration(**{**given, **changes})


def test_a_known_speed_is_found_again() -> None:
    found = pass_speed(timed(TRUE))
    for name in PassSpeed.model_fields:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name


def test_passes_that_were_disturbed_give_times_that_are_no_further_off() -> None:
    found = pass_speed(timed(TRUE, off=0.1))
    for blocks, flops, head in SIZES:
        assert found.seconds(1, blocks, flops, head) == pytest.approx(TRUE.seconds(1, blocks, flops, head), rel=0.11)


def test_passes_through_one_number_of_blocks_put_what_is_fixed_on_the_blocks() -> None:
    alike = [Timed(5, flops, 0.0, 0.05 + flops / 1e10) for flops in (1e7, 1e9, 1e10)]
    found = pass_speed(alike, apart=False)
    assert (found.call_s, found.head_flops) == (0, found.flops)
    assert found.block_s == pytest.approx(0.01)
    assert found.flops == pytest.approx(1e10)


def test_no_cost_is_ever_negative() -> None:
    """The second takes less than its share: fitted freely, the first column would be below 0."""
    factors = not_negative([[1.0, 1.0], [1.0, 4.0]], [1.0, 8.0], needed=(1,))
    assert factors[0] == 0
    assert factors[1] > 0


def test_repeats_that_were_disturbed_do_not_count() -> None:
    assert undisturbed([1.0, 9.0, 1.2, 7.0, 1.1]) == pytest.approx(1.1)
    assert undisturbed([2.0]) == 2.0


def test_between_two_numbers_of_threads_costs_are_shared_as_far_as_they_were() -> None:
    """Of 1 ns a FLOP with one thread and 1/3 with four, 1/9 is not shared and 8/9 is: 5/9 with two."""
    speeds = {1: speed(1e9), 4: speed(3e9)}
    assert speed_at(speeds, 2).forward.flops == pytest.approx(9e9 / 5)
    assert speed_at(speeds, 2).backward.block_s == pytest.approx(0.01)
    assert speed_at(speeds, 4) == speeds[4]


def test_beyond_what_was_measured_nothing_is_promised() -> None:
    speeds = {2: speed(1e9), 4: speed(3e9)}
    assert speed_at(speeds, 64) == speeds[4]
    assert speed_at(speeds, 1) == speeds[2]


def test_from_one_number_of_threads_others_follow_by_what_is_assumed() -> None:
    found = speed_at({1: speed(1e9)}, 2)
    assert found.forward.flops == pytest.approx(1e9 * 2**GAINED)
    assert found.forward.block_s == 0.01


def test_a_file_holds_what_plans_take(tmp_path: Path) -> None:
    path, made = tmp_path / "here.json", calibration()
    path.write_text(made.to_json())
    found = read(path)
    assert found == made
    assert found.link == Link(0.02, 1e6, 2e6)
    edge, cloud = found.edge_at(1), found.cloud
    assert edge is not None
    assert cloud is not None
    assert (edge.flops, edge.memory_bytes, cloud.flops) == (1e9, 8e9, 1e11)
    assert "4 threads, measured" in (found.edge.source if found.edge is not None else "")
    assert "2 threads, from 1 and 4" in (machine.source if (machine := found.edge_at(2)) is not None else "")


def test_what_was_not_measured_is_none() -> None:
    bare = calibration(speeds={}, line=None, cloud_speed=None, model=None)
    assert (bare.edge, bare.edge_at(2), bare.link, bare.cloud) == (None, None, None, None)


def changed(*path: str, to: object) -> str:
    """A file with one thing changed."""
    content = json.loads(calibration().to_json())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file: Invalid JSON"),
        ("[]", "the file: "),
        (changed("schema", to="isthmus-calibration/9"), "schema: "),
        (changed("speeds", "1", "forward", "flops", to=-1), "speeds.1.forward.flops: "),
        (changed("speeds", "1", "forward", "flops", to="fast"), "speeds.1.forward.flops: "),
        (changed("speeds", to={"0": {}}), "speeds.0"),
        (changed("line", "up", to=0), "line.up: "),
        (changed("line", "lost", to=0.1), "line.lost: "),
        (changed("handling", to=None), "handling: "),
        (changed("surprise", to=1), "surprise: "),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_says_where(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UsageError) as refused:
        read(path)
    message = str(refused.value)
    assert message.startswith(f"--calibration {path} is no calibration ({words}")
    assert message.endswith("make one with `edge_client calibrate`")
    assert "\n" not in message


def test_a_missing_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.json cannot be read .*; check the path"):
        read(tmp_path / "gone.json")
