"""Measuring shows how far it is, row by row where rows are long, and says on how much text it measured."""

import io
from pathlib import Path

import pytest
from rich.console import Console

import emulator.measure
from emulator.measure import AT_ONCE, batches, measure
from emulator.text import read_text
from isthmus.training.data import TokenSequence
from tests.emulator.conftest import QUIET, filled


def rows(*lengths: int) -> list[TokenSequence]:
    return [TokenSequence(tuple(range(3, 3 + length)), (False, *[True] * (length - 1))) for length in lengths]


@pytest.mark.parametrize("lengths", [[256] * 6, [40] * 30, [9, 256, 2000, 30, 31, 120], [5]])
def test_batches_are_small_however_long_rows_are_and_hold_each_row_once(lengths: list[int]) -> None:
    made = batches(rows(*lengths), AT_ONCE)
    assert all(batch.input_ids_BT.numel() <= AT_ONCE or len(batch.input_ids_BT) == 1 for batch in made)
    assert sorted(length for batch in made for length in batch.attention_mask_BT.sum(1).tolist()) == sorted(
        length - 1 for length in lengths
    )


def test_progress_shows_while_a_few_long_rows_are_measured_and_batches_change_no_figure(
    homes: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = read_text(text, homes["llama"], 256)
    assert len(public.held_out) < 8
    pair = filled(homes["llama"], text, method="quant", bits=4)
    monkeypatch.setattr("isthmus.training.progress.EVERY_S", 0.0)
    said = io.StringIO()
    found = measure(pair, public.rows[:5], public.digest, Console(file=said, width=200))
    lines = said.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert "held-out rows" in lines[0]
    assert found.rows == 5
    monkeypatch.setattr(emulator.measure, "AT_ONCE", 1 << 20)
    whole = measure(pair, public.rows[:5], public.digest, QUIET)
    assert found.hidden == pytest.approx(whole.hidden, rel=1e-4)
    assert found.gap == pytest.approx(whole.gap, abs=1e-5)
    assert found.tokens == whole.tokens
