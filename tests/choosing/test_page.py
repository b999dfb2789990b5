"""docs/choosing.md says nothing that no row says."""

import re

import pytest

from benchmarks.choosing import PAGE, Quotation, quotations, tables
from benchmarks.results import Figure, latest
from benchmarks.tables import found

SENTENCES = [line for line in PAGE.read_text().splitlines() if line.startswith("- ")]
NAMED = re.compile(r"`((?:methods|dlora|offsite|forward-only|devices)/[^`]+)`")


def test_the_tables_are_current() -> None:
    assert found(PAGE) == tables(), "run `python -m benchmarks.methods --minutes 0`"


@pytest.mark.parametrize("quotation", quotations(PAGE.read_text()), ids=lambda each: f"{each.row}-{each.figure}")
def test_a_figure_that_is_quoted_is_the_row_s(quotation: Quotation) -> None:
    figures = latest()[quotation.row].outcome.figures
    assert quotation.figure in figures, f"{quotation.row} has {', '.join(figures)}"
    assert quotation.is_of(figures[quotation.figure]), figures[quotation.figure]


def test_each_advice_names_a_row_and_quotes_it() -> None:
    assert len(SENTENCES) > 5
    for sentence in SENTENCES:
        quoted = {each.row for each in quotations(sentence)}
        assert NAMED.search(sentence), sentence
        assert quoted, sentence
        assert quoted <= set(NAMED.findall(sentence)), sentence


def test_every_row_that_is_named_is_there() -> None:
    text = re.sub(r"<!-- table open -->.*?<!-- end -->", "", PAGE.read_text(), flags=re.DOTALL)
    assert set(NAMED.findall(text)) <= set(latest())


def test_a_quotation_is_not_of_another_figure() -> None:
    figure = Figure(88.149, "%", 85.02, 90.54)
    for text in ("88.1 %", "88 %", "88.15 % (85.02 to 90.54)", "88.1 (85.0 to 90.5)"):
        assert Quotation(text, "row", "accuracy").is_of(figure), text
    for text in ("88.2 %", "88.1 % (85.1 to 90.5)", "right", "-88.1 %", "88.1 to 85.0"):
        assert not Quotation(text, "row", "accuracy").is_of(figure), text
    assert Quotation("4,609", "row", "bytes").is_of(Figure(4609.4, ""))
    assert not Quotation("88.1 % (85.0 to 90.5)", "row", "accuracy").is_of(Figure(88.149, "%"))
