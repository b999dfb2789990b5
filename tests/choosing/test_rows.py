"""The rows that compare methods: measured in an order that helps, once, and shown as they are."""

from pathlib import Path

import pytest
import typer

from benchmarks import methods_figures as figures
from benchmarks.methods import Sitting, rows_to_do
from benchmarks.methods_chapters import CHAPTERS, METHODS
from benchmarks.methods_data import BATCH, PREFIX, TOKENS, enough
from benchmarks.methods_rows import METHODS as KNOWN
from benchmarks.methods_rows import VARIANTS, Variant
from benchmarks.page import write
from benchmarks.results import Figure, Machine, Outcome, Row
from benchmarks.scores import ACCURACY, LOSS
from edge_client.peft_methods import METHODS as PEFT_METHODS

NAMES = [variant.name for variant in VARIANTS]
MACHINE = Machine("a processor", 2, 4.0, "versions")


def row(name: str, right: float, commit: str = "abc") -> Row:
    """A row with the figures that a table shows of it."""
    found = {
        ACCURACY: Figure(right, "%", right - 2, right + 2),
        LOSS: Figure(0.5, "nats per token"),
        figures.stage_of(figures.CHANGE, ACCURACY): Figure(right - 80, "points", right - 82, right - 78),
        figures.stage_of(figures.CHANGE, LOSS): Figure(-5, "nats per token"),
        figures.UP: Figure(2304.5, ""),
    }
    return Row(PREFIX + name, Outcome(found, ()), f"measure {name}", commit, MACHINE, "2026-01-01", 1)


def test_every_method_comes_first_then_every_domain_and_no_row_twice() -> None:
    first = VARIANTS[: len(KNOWN)]
    assert {variant.method for variant in first} == set(KNOWN)
    assert {(variant.domain, variant.cut) for variant in first} == {("movies", "2:2")}
    later = [variant.domain for variant in VARIANTS[len(KNOWN) : 4 * len(KNOWN)]]
    assert later == [domain for domain in ("tweets", "products", "news") for _ in KNOWN]
    assert len(set(NAMES)) == len(NAMES)


def test_the_row_that_others_are_compared_with_is_measured_before_them() -> None:
    for variant in VARIANTS:
        assert NAMES.index(variant.reference.name) <= NAMES.index(variant.name)


def test_what_trains_is_a_method_that_there_is() -> None:
    assert {variant.peft for variant in VARIANTS} <= set(PEFT_METHODS)


def test_a_row_that_is_there_is_not_measured_again_unless_it_is_asked_for() -> None:
    there = {PREFIX + NAMES[0], PREFIX + NAMES[2]}
    assert [variant.name for variant in rows_to_do(None, False, there)] == [NAMES[1], *NAMES[3:]]
    assert rows_to_do([NAMES[0]], False, there) == []
    assert [variant.name for variant in rows_to_do([NAMES[0]], True, there)] == [NAMES[0]]
    with pytest.raises(typer.BadParameter, match="no row is named nobody"):
        rows_to_do(["nobody"], False, there)


def test_a_sitting_ends_after_the_present_row_and_a_row_that_fails_stops_no_other(tmp_path: Path) -> None:
    stop, done = tmp_path / "stop", []

    def work(variant: Variant) -> Outcome:
        if variant is VARIANTS[0]:
            raise RuntimeError("it broke")
        return Outcome({}, ())

    def note(variant: Variant, outcome: Outcome) -> None:
        done.append(variant)
        if variant is VARIANTS[2]:
            stop.touch()

    failed = Sitting(VARIANTS[:5], None, stop).carry_out(work, note)
    assert done == list(VARIANTS[1:3])
    assert failed == [f"{NAMES[0]}: it broke"]


def test_no_row_begins_after_the_time() -> None:
    done: list[Variant] = []
    Sitting(VARIANTS, 0.0, None).carry_out(lambda variant: Outcome({}, ()), lambda variant, _: done.append(variant))
    assert done == []


def test_each_domain_gives_as_many_tokens_in_whole_batches() -> None:
    for length in (7, 30, 200):
        rows = enough([length] * (TOKENS // 5))
        assert rows % BATCH == 0
        assert 0 <= rows * length - TOKENS < BATCH * length
    assert enough([10] * 21) == 16


def test_the_page_shows_rows_of_any_commit_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "benchmarks.md"
    monkeypatch.setattr("benchmarks.page.PAGE", page)
    rows = [row(NAMES[2], 85.0, "later"), row(NAMES[0], 88.2)]
    write([], CHAPTERS, {each.name: each for each in rows})
    table = [line for line in page.read_text().splitlines() if line.startswith("| movies/")]
    assert [line.split(" | ")[0] for line in table[:2]] == [f"| {NAMES[0]}", f"| {NAMES[2]}"]
    assert table[0].split(" | ")[1:3] == ["88.2 (86.2 to 90.2)", "8.2 (6.2 to 10.2)"]
    assert "2,304" in table[0]


def test_a_chapter_that_would_show_the_reference_alone_or_nothing_is_left_out() -> None:
    alone = {PREFIX + NAMES[0]: row(NAMES[0], 88.2)}
    assert [chapter.title for chapter in CHAPTERS if chapter.compared(alone)] == [METHODS.title]
    assert [chapter for chapter in CHAPTERS if chapter.compared({})] == []
    assert all(chapter.rows[0] == NAMES[0] for chapter in CHAPTERS)
