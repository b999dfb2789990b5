"""docs/scaling.md says what the script prints, and the script's bottlenecks are what its numbers say."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.needs import INT8, Need, Setting, dlora, split, split_again
from benchmarks.scaling import EDGES, PAGE, SHAPE, emulator_bytes, needs, tables
from benchmarks.shapes import BFLOAT16
from benchmarks.tables import found, put
from cloud_node.config import ServeConfig


def summary() -> list[list[str]]:
    """The cells of the rows of the table at the top."""
    _, _, *rows = tables(Setting())["summary"].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_page_is_current() -> None:
    assert found(PAGE) == tables(Setting()), "run `python -m benchmarks.scaling --write`"


def test_what_it_comes_to_stands_before_any_explanation() -> None:
    title, first, *_ = [line for line in PAGE.read_text().splitlines() if line]
    assert (title[:2], first) == ("# ", "<!-- table summary -->")


def test_the_summary_has_every_method_for_every_number_of_edges_and_marks_those_that_are_too_slow() -> None:
    known = {need.method.name: need for need in needs(SHAPE, Setting())}
    shown = {(edges, re.sub(r" \(.*\)", "", method)): cells for edges, method, *cells in summary()}
    assert set(shown) == {(f"{edges:,}", name) for edges in EDGES for name in (*known, "`offsite`")}
    for (_, name), cells in shown.items():
        need = known.get(name)
        slow = need is None or need.steps_per_hour < Setting().steps_per_hour
        assert ("not reached" in cells[-1]) == slow, name
        assert need is None or cells[-2] == need.bottleneck
    assert {name for (_, name), cells in shown.items() if "not reached" in cells[-1]} >= {dlora(SHAPE, Setting()).name}


def test_nothing_kept_is_first_named_with_the_flag_that_asks_for_it() -> None:
    text = PAGE.read_text().lower()
    first = text.index("nothing kept")
    assert "--activation-budget 0" in text[first : text.index("\n", first)]


def test_a_flag_that_a_method_is_named_with_is_one_that_the_node_has() -> None:
    flags = [need.method.flag for need in needs(SHAPE, Setting()) if need.method.flag]
    assert flags == [split_again(SHAPE).flag]
    command, _, flag = flags[0].partition(" --")
    assert command == "cloud_node serve"
    assert flag.split()[0].replace("-", "_") in ServeConfig.model_fields


def test_weights_in_8_bits_take_as_much_in_the_levers_as_in_an_emulator() -> None:
    [row] = [row for row in tables(Setting())["levers"].splitlines() if row.startswith("| weights in 8 bits")]
    stored = Need(SHAPE, replace(Setting(), weight_bytes=INT8), split(SHAPE))
    assert f"| {stored.setting.gpus * stored.replicas(EDGES[-1]):,} |" in row
    assert emulator_bytes(SHAPE, 2) == pytest.approx(stored.weights + SHAPE.ends(2) * BFLOAT16)


def test_no_figure_is_written_with_an_exponent() -> None:
    assert not re.search(r"\de[+-]?\d", PAGE.read_text())


def test_the_command_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main()
    printed = capsys.readouterr().out
    assert all(text in printed for text in tables(Setting()).values())


def test_a_page_without_a_tables_mark_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table one -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="one"):
        put(page, {"two": "| |"})


def test_as_many_replicas_as_are_needed_and_no_fewer() -> None:
    for need in needs(SHAPE, Setting()):
        replicas, rate = need.replicas(100_000), need.rate(100_000)
        most = min(need.capacity["computing"], need.capacity["memory"])
        assert replicas * most >= rate
        assert replicas * need.sessions >= 100_000
        assert (replicas - 1) * most < rate or (replicas - 1) * need.sessions < 100_000


def test_what_waits_for_backwards_fits_beside_the_weights() -> None:
    for need in needs(SHAPE, Setting()):
        replicas = need.replicas(1000)
        usable = replicas * need.setting.gpus * need.setting.memory * need.setting.usable
        assert need.gpu_bytes(1000) <= usable


def test_the_bottleneck_is_what_more_of_it_relieves() -> None:
    kept = Need(SHAPE, Setting(), split(SHAPE))
    assert kept.bottleneck == "memory"
    more = Need(SHAPE, replace(Setting(), memory=2 * Setting.memory), split(SHAPE))
    assert more.replicas(1000) < kept.replicas(1000)
    faster = Need(SHAPE, replace(Setting(), peak=2 * Setting.peak), split(SHAPE))
    assert faster.replicas(1000) > 0.95 * kept.replicas(1000)
    again = Need(SHAPE, Setting(), split_again(SHAPE))
    assert again.bottleneck == "computing"


def test_an_edge_that_is_too_slow_is_told_whether_by_its_line_or_by_its_computing() -> None:
    ports = dlora(SHAPE, Setting())
    assert Need(SHAPE, Setting(), ports).bottleneck == "the edge's line"
    assert Need(SHAPE, replace(Setting(), link=1e15, edge=1e9), ports).bottleneck == "the edge's computing"
