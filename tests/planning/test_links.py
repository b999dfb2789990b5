"""Links and devices have names, and every name is one that plans and `train --link` read alike."""

import pytest

from edge_client.config import TrainConfig
from edge_client.pacing import Pace
from isthmus.errors import UsageError
from isthmus.planning import links, machines
from isthmus.planning.links import MBIT, NAMED, Link
from isthmus.planning.machines import BOARDS, USABLE, Machine, Speed, machine_of
from isthmus.settings import validated


def test_names_are_those_that_users_are_promised() -> None:
    assert list(NAMED) == ["loopback", "fibre", "wifi", "5g", "4g", "satellite"]


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_its_three_numbers_and_stands_with_its_source_in_the_table(name: str) -> None:
    round_trip_ms, up, down = NAMED[name]
    assert Link.parse(name) == Link(round_trip_ms / 1e3, up * MBIT, down * MBIT)
    assert Link.parse(name) == Link.parse(f"{round_trip_ms}:{up}:{down}")
    row = next(line for line in (links.__doc__ or "").splitlines() if line.startswith(f"| {name} |"))
    *figures, source = (cell.strip() for cell in row.strip("|").split("|")[1:])
    assert [float(figure) for figure in figures] == [round_trip_ms, up, down]
    assert source


def test_training_paces_its_line_by_the_same_names() -> None:
    config = validated(TrainConfig, {"method": "split", "data": "rows", "server": "here:1", "link": "4g"})
    assert isinstance(config.pace, Pace)
    assert (config.pace.round_trip_s, config.pace.up, config.pace.down) == (0.05, 8.6 * MBIT, 27 * MBIT)


def test_what_is_no_link_is_refused_with_all_names() -> None:
    with pytest.raises(UsageError, match=r"'3g' is none of loopback, .*, satellite, and not of the form RTT:UP:DOWN"):
        Link.parse("3g")


def test_a_device_of_the_table_reaches_a_share_of_its_peak_and_says_so() -> None:
    machine, board = machine_of("pi-5"), BOARDS[1]
    assert machine.name == "Raspberry Pi 5"
    assert machine.flops == pytest.approx(USABLE * 4 * 2.4e9 * 16)
    assert machine.memory_bytes == board.memory - board.system
    assert "vendor's peak x assumed 30%" in machine.source


def test_what_is_faster_in_bfloat16_is_so_only_there() -> None:
    whole, half = machine_of("a100"), machine_of("a100", "bfloat16")
    assert (whole.flops, half.flops) == pytest.approx((USABLE * 19.5e12, USABLE * 312e12))
    assert machine_of("pi-5", "bfloat16") == machine_of("pi-5")


@pytest.mark.parametrize("name", machines.NAMED)
def test_every_device_has_a_speed_a_memory_and_a_source(name: str) -> None:
    machine = machine_of(name)
    assert 1e9 < machine.flops < 1e15
    assert machine.memory_bytes is not None
    assert 1e9 < machine.memory_bytes < 1e12
    assert machine.source


def test_a_device_may_be_made_by_hand_and_an_unknown_one_is_refused() -> None:
    assert Machine.by_hand(2e12, 8e9).flops == 2e12
    with pytest.raises(UsageError, match=r"no device is called 'cray'; take one of pi-4, .*, h100, or say how fast"):
        machine_of("cray")


def test_a_speed_counts_calls_blocks_and_the_output_layer_apart() -> None:
    one = Speed.of(1e9, block_s=0.5).forward.model_copy(update={"head_flops": 1e8, "call_s": 0.25})
    assert one.seconds(calls=2, blocks=6, flops=3e9, head_flops=1e9) == pytest.approx(0.5 + 3.0 + 2.0 + 10.0)
