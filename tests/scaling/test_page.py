"""docs/scaling.md says what the script prints, and the script's bottlenecks are what its numbers say."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.needs import Need, Setting, split, split_again
from benchmarks.scaling import PAGE, SHAPE, needs, tables
from benchmarks.tables import found, put


def test_the_page_is_current() -> None:
    assert found(PAGE) == tables(Setting()), "run `python -m benchmarks.scaling --write`"


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
