"""docs/devices.md says first what fits a small board: as extrapolated, and how far off that was where measured."""

import re
from dataclasses import replace

import pytest

from benchmarks.boards import (
    COMPUTING,
    EDGES,
    PRODUCT,
    REACHED,
    REFERENCE,
    ROOMS,
    SPEED,
    STEPPING,
    Found,
    Spread,
    beyond,
    efficiency,
    fitting,
    memory,
    memory_shares,
    product_shares,
    product_speed,
)
from benchmarks.devices import CASES, ON_PAPER, PAGE, measured, tables
from benchmarks.results import Figure
from benchmarks.shapes import FLOAT32
from benchmarks.tables import found as written
from isthmus.planning.machines import BOARDS

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def cells(name: str) -> list[list[str]]:
    """Of a table of the page, without its heading."""
    rows = [line for line in written(PAGE)[name].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def numbers(text: str) -> list[float]:
    """In a text, sizes in bytes."""
    numbered = re.findall(r"(\d[\d,]*(?:\.\d+)?)(?: ([kMG]B))?", text)
    return [float(digits.replace(",", "")) * UNITS.get(unit, 1) for digits, unit in numbered]


def said(pattern: str) -> list[float]:
    """Numbers in the points under the first table."""
    match = re.search(pattern, written(PAGE)["fits"])
    assert match is not None, pattern
    return numbers(" ".join(match.groups()))


def checked() -> tuple[list[list[float]], list[list[float]]]:
    """Shares of memory and, in float32, of seconds, of each measured edge on the page but the reference."""
    _, *others = cells("checks")
    return [numbers(row[6]) for row in others], [numbers(row[9]) for row in others if row[3] == "float32"]


def fastest_step(found: Found) -> float:
    """Of float32's edges but the reference, in GFLOP/s on paper."""
    edges = {name: edge for name, edge in ON_PAPER.items() if edge.value == FLOAT32 and edge != REFERENCE}
    return max(edge.flops / 1e9 / Spread.of(found[name][COMPUTING]).low for name, edge in edges.items())


def test_what_fits_stands_before_any_explanation() -> None:
    title, first, *_ = [line for line in PAGE.read_text().splitlines() if line]
    assert (title, first) == ("# Devices", "<!-- table fits -->")


def test_the_shares_at_the_top_are_the_extremes_of_all_rows_of_the_checks() -> None:
    memories, times = checked()
    assert len(memories) + 1 == len([case for case in CASES if case.peft == "lora"])
    assert said(r"took (\S+ to \S+) of the memory") == [min(map(min, memories)), max(map(max, memories))]
    assert said(r"in float32 (\S+ to \S+) of the seconds") == [min(map(min, times)), max(map(max, times))]


def test_an_edge_that_is_left_out_lies_as_near_the_others_as_is_said() -> None:
    memories, times = checked()
    for ranges, pattern, most in (
        (memories, r"(\S+) times further out in memory", 1.25),
        (times, r"(\S+) times in seconds", 1.5),
    ):
        lows, highs = sorted(map(min, ranges)), sorted(map(max, ranges))
        furthest = max(lows[1] / lows[0], highs[-1] / highs[-2])
        assert said(pattern) == pytest.approx([furthest], rel=0.01)
        assert furthest < most


def test_one_that_lies_within_the_others_is_not_beyond_them() -> None:
    assert beyond([Spread(1, 2), Spread(1, 2), Spread(1.2, 1.8)]) == 1
    assert beyond([Spread(1, 2), Spread(0.5, 2), Spread(1, 6)]) == 3


def test_no_step_is_said_to_be_faster_than_a_matrix_product() -> None:
    found = measured()
    for case in CASES:
        fastest, product = found[case.name][SPEED].high, found[PRODUCT][case.dtype].high
        assert fastest is not None
        assert product is not None
        assert fastest <= product, f"{case.name}: measure `matrix-product` again on a quiet machine"
    assert efficiency(found) <= 1
    for row, edge in zip(cells("board-seconds"), EDGES, strict=True):
        for cell, board in zip(row[4:], BOARDS, strict=True):
            assert cell == "does not fit" or numbers(cell)[1] >= 0.99 * edge.flops / (board.peak * REACHED)


@pytest.mark.parametrize(("slowest", "share"), [(2, 0.5), (0.1, 0.25)])
def test_a_product_is_as_fast_as_its_best_or_its_slowest_repeat_but_not_slower_than_a_step(
    slowest: float, share: float
) -> None:
    found = measured()
    step = fastest_step(found)
    found[PRODUCT] = {"float32": Figure(3 * step, "GFLOP/s", slowest * step, 4 * step)}
    assert product_speed(found) == 4e9 * step
    spread = product_shares(found, ON_PAPER)
    assert (spread.low, spread.high) == pytest.approx((share, 1))


def test_seconds_on_a_board_are_what_the_tables_beside_them_come_to() -> None:
    *_, [_, step], [_, product], [_, reached] = cells("factors")
    shares = said(r"in float32 (\S+ to \S+) of the seconds")
    for ends, row in zip(cells("ends"), cells("board-seconds"), strict=True):
        assert ends[:4] == row[:4]
        for cell, [_, _, peak, *_] in zip(row[4:], cells("boards"), strict=True):
            if cell != "does not fit":
                spent = float(ends[-1]) * 1e3 / (numbers(peak)[0] * float(step) * float(reached))
                bracket = [share * factor * spent for share, factor in zip(shares, numbers(product), strict=True)]
                assert numbers(cell) == pytest.approx([spent, *bracket], rel=0.02)


def test_memory_of_an_edge_is_what_the_tables_beside_it_come_to() -> None:
    imported = numbers(cells("memory")[0][7])[0] * 1e6
    working = numbers(cells("factors")[1][1])[0]
    shares = said(r"took (\S+ to \S+) of the memory")
    for row, edge in zip(cells("ends"), EDGES, strict=True):
        rows, _, lossy = numbers(row[2])
        at_work = 2 * rows * lossy * edge.shape.vocabulary * FLOAT32
        taken = sum(numbers(" ".join(row[4:8]))) + imported + working + at_work
        assert numbers(row[8]) == pytest.approx([taken, *(share * taken for share in shares)], rel=0.02)


def test_it_fits_only_where_it_would_if_it_took_as_much_more_as_was_measured() -> None:
    found, spread = measured(), Spread(0.5, 2.0)
    taken = memory(REFERENCE, found)
    assert fitting(REFERENCE, 2.01 * taken, found, spread) == "fits"
    assert fitting(REFERENCE, 1.99 * taken, found, spread) == "too close to tell"
    assert fitting(REFERENCE, 0.51 * taken, found, spread) == "too close to tell"
    assert fitting(REFERENCE, 0.49 * taken, found, spread) == "no"


def test_what_an_operating_system_keeps_is_taken_off_and_a_phones_is_most() -> None:
    for board in BOARDS:
        assert board.room < board.memory
    assert min(room for name, room in ROOMS.items() if name.endswith("8 GB")) == ROOMS["a phone of 8 GB"]
    phone = next(board for board in BOARDS if board.name.startswith("Phone"))
    assert phone.room == ROOMS["a phone of 8 GB"]
    assert {"a board of 1 GB", "a board of 2 GB", "a board of 4 GB", "a board of 8 GB"} <= set(ROOMS)


@pytest.mark.parametrize("name", ["fits", "checks", "ends"])
def test_a_column_of_extrapolated_figures_says_that_it_is_one(name: str) -> None:
    assert "extrapolated" in tables()[name].splitlines()[0]


def test_every_extrapolated_figure_of_an_edge_has_its_shares_beside_it() -> None:
    made = tables()
    for name in ("fits", "ends"):
        rows = [line for line in made[name].splitlines()[2:] if line.startswith("|")]
        assert len(rows) == len(EDGES)
        assert all(re.search(r" \([\d.,]+ [kMG]B to [\d.,]+ [kMG]B\)", row) for row in rows)
    for row in made["board-seconds"].splitlines()[2:]:
        figures = [cell.strip() for cell in row.strip("|").split("|")][-len(BOARDS) :]
        assert all(cell == "does not fit" or re.search(r"\(.+ to .+\)", cell) for cell in figures)


def test_a_figure_that_is_measured_anew_changes_what_is_said_at_the_top() -> None:
    found = measured()
    more = {name: dict(figures) for name, figures in found.items()}
    more["row"][STEPPING] = replace(more["row"][STEPPING], value=2 * more["row"][STEPPING].value)
    shares, fewer = (Spread.over(memory_shares(each, ON_PAPER)) for each in (more, found))
    assert shares.high > fewer.high


def test_no_measured_figure_is_written_by_hand() -> None:
    by_hand = re.sub(r"<!-- table (\S+) -->.*?<!-- end -->", "", PAGE.read_text(), flags=re.DOTALL)
    assert not re.search(r"\d ?(MB|GB|MiB|s|GFLOP/s)\b", by_hand)
