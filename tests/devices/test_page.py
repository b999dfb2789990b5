"""docs/devices.md says what was measured, and its arithmetic finds again what was measured before it goes further."""

from dataclasses import replace

import pytest

from benchmarks import boards, devices
from benchmarks.boards import COMPUTED, HELD, REFERENCE, STEPPING, TRAINS, Edge, memory, seconds
from benchmarks.devices import CASES, PAGE, Case, measured, tables
from benchmarks.shapes import BFLOAT16, FLOAT32, LLAMA_8B, LLAMA_70B, SMOLLM2
from benchmarks.tables import found
from isthmus.planning.machines import BOARDS

LORA = [case for case in CASES if case.peft == "lora"]


def on_paper(case: Case) -> Edge:
    value = FLOAT32 if case.dtype == "float32" else BFLOAT16
    return Edge(case.shape, case.cut, case.rows, case.tokens, case.lossy, value)


def test_the_page_is_current() -> None:
    assert found(PAGE) == tables(), "run `python -m benchmarks.devices`"


def test_one_thing_at_a_time_differs_from_the_first_case() -> None:
    first, *others = (case for case in CASES if case.shape is SMOLLM2)
    for case in others:
        names = ("cut", "rows", "tokens", "lossy", "peft", "dtype")
        changed = [name for name in names if getattr(case, name) != getattr(first, name)]
        assert len(changed) == 1, case.name


@pytest.mark.parametrize("case", LORA, ids=lambda case: case.name)
def test_parameters_and_flops_on_paper_are_those_that_were_counted(case: Case) -> None:
    edge, row = on_paper(case), measured()[case.name]
    adapter = case.shape.lora(boards.RANK, case.end_blocks)
    assert row[TRAINS].value == adapter
    assert row[HELD].value == case.shape.ends(case.end_blocks) + adapter
    assert edge.flops / 1e9 == pytest.approx(row[COMPUTED].value, rel=0.1)


@pytest.mark.parametrize("case", LORA, ids=lambda case: case.name)
def test_memory_on_paper_is_near_what_was_measured(case: Case) -> None:
    rows = measured()
    assert memory(on_paper(case), rows) / 1e6 == pytest.approx(rows[case.name][STEPPING].value, rel=0.25)


def test_the_embeddings_alone_decide_which_ends_fit() -> None:
    rows, (small, large) = measured(), (BOARDS[0], BOARDS[1])
    assert memory(REFERENCE, rows) < small.memory
    eight, seventy = (Edge(shape, "0:0", 1, 256, 64, BFLOAT16) for shape in (LLAMA_8B, LLAMA_70B))
    assert eight.weights / LLAMA_8B.embeddings == pytest.approx(BFLOAT16, rel=1e-4)
    assert memory(eight, rows) < large.memory
    assert memory(replace(seventy, cut="1:1"), rows) > large.memory


def test_a_board_with_twice_the_peak_takes_half_the_time() -> None:
    rows, board = measured(), BOARDS[0]
    twice = replace(board, peak=2 * board.peak)
    assert seconds(REFERENCE, twice, rows) == pytest.approx(seconds(REFERENCE, board, rows) / 2)


def test_every_case_has_a_row() -> None:
    assert set(measured()) == set(devices.SERIES.others)
