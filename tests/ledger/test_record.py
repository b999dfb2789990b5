"""The ledger loses nothing, invents nothing and survives a crash."""

import json
import sys
from pathlib import Path
from threading import Thread

import pytest

from isthmus.errors import RunError
from isthmus.ledger.record import FIGURES, PEAKS, PHASES, Ledger


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_totals_are_exact_when_threads_add_while_steps_close(path: Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet inside an addition
    ledger = Ledger(path)

    def spend() -> None:
        for _ in range(3000):
            ledger.add("train", up_bytes=3, round_trips=1)
            ledger.add("train", at="12", up_bytes=2)
            ledger.peak("edge_peak_tensor_bytes", 7)

    threads = [Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for step in range(20):
        ledger.close_step(step)
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    ledger.close_step(20)
    assert ledger.totals("train") == {"up_bytes": 72_000, "round_trips": 24_000}
    assert sum(line.get("up_bytes", 0) for line in lines(path)) == 72_000  # type: ignore[misc]
    assert ledger.places("train") == Ledger.resume(path).places("train") == {"12": {"up_bytes": 48_000}}


def test_a_step_is_one_line_for_each_phase_that_spent_something(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("train", up_bytes=10, edge_wait_s=0.5)
    ledger.add("eval", down_bytes=4)
    ledger.close_step(1)
    ledger.close_step(2)
    ledger.add("train", up_bytes=5, edge_wait_s=0)
    ledger.close_step(3)
    assert lines(path) == [
        {"step": 1, "phase": "train", "up_bytes": 10, "edge_wait_s": 0.5},
        {"step": 1, "phase": "eval", "down_bytes": 4},
        {"step": 3, "phase": "train", "up_bytes": 5},
    ]


def test_counts_stay_whole_numbers_beyond_what_a_float_holds(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("train", edge_forward_flops=2**60 + 1)
    ledger.add("train", edge_forward_flops=2)
    ledger.close_step(1)
    total = Ledger.resume(path).total("train", "edge_forward_flops")
    assert total == 2**60 + 3
    assert isinstance(total, int)


def test_a_peak_keeps_its_maximum_and_is_written_only_when_it_rises(path: Path) -> None:
    ledger = Ledger(path)
    for step, value in enumerate((5, 9, 7)):
        ledger.peak("cloud_peak_memory_bytes", value, "train")
        ledger.add("train", round_trips=1)
        ledger.close_step(step)
    assert ledger.peaks() == Ledger.resume(path).peaks() == {"cloud_peak_memory_bytes": 9}
    assert [line.get("cloud_peak_memory_bytes") for line in lines(path)] == [5, 9, None]


def test_each_phase_has_a_peak_of_its_own_and_a_run_has_the_greatest(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("train", round_trips=1)
    for phase, value in (("eval", 4), ("train", 9), ("eval", 6)):
        ledger.peak("edge_peak_memory_bytes", value, phase)  # type: ignore[arg-type]
    ledger.close_step(1)
    assert [(line["phase"], line["edge_peak_memory_bytes"]) for line in lines(path)] == [("train", 9), ("eval", 6)]
    for found in (ledger, Ledger.resume(path)):
        assert found.peaks() == found.peaks("train") == {"edge_peak_memory_bytes": 9}
        assert found.peaks("eval") == {"edge_peak_memory_bytes": 6}
        assert found.peaks("fetch") == {}


def test_a_peak_alone_is_written_too(path: Path) -> None:
    ledger = Ledger(path)
    ledger.peak("edge_peak_memory_bytes", 11)
    ledger.close_step(1)
    assert Ledger.resume(path).peaks() == {"edge_peak_memory_bytes": 11}


def test_overhead_is_what_was_neither_tensor_nor_bundle_file() -> None:
    ledger = Ledger()
    ledger.add("train", up_bytes=100, up_payload_bytes=90, down_bytes=50, down_payload_bytes=45)
    ledger.add("eval", up_bytes=1000)
    assert ledger.overhead_bytes("train") == 15


def test_a_figure_never_added_does_not_exist_but_one_added_as_zero_does_even_after_a_crash(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("train", cloud_backward_flops=0)
    ledger.close_step(1)
    for known in (ledger, Ledger.resume(path)):
        assert known.totals("train") == {"cloud_backward_flops": 0}
        assert known.total("train", "cloud_forward_flops") == 0


def test_resuming_goes_on_from_what_was_spent_to_the_last_bit(path: Path) -> None:
    whole = Ledger(path)
    for step in range(10):
        whole.add("train", edge_wait_s=0.1 * step, up_bytes=step)
        whole.close_step(step)
    resumed = Ledger.resume(path)
    assert resumed.totals("train") == whole.totals("train")
    for ledger in (whole, resumed):
        ledger.add("train", edge_wait_s=0.3, up_bytes=1)
    resumed.close_step(5)
    assert Ledger.resume(path).totals("train") == whole.totals("train")


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("train", up_bytes=10)
    ledger.close_step(1)
    whole = path.read_bytes()
    for end in range(1, len(whole)):
        path.write_bytes(whole + whole[:end])
        resumed = Ledger.resume(path)
        assert path.read_bytes() == whole
        assert resumed.total("train", "up_bytes") == 10


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[1]",
        '{"phase": "train"}',
        '{"step": 1}',
        '{"step": -1, "phase": "train"}',
        '{"step": 1, "phase": "lunch"}',
        '{"step": 1, "phase": "train", "bytes": 1}',
        '{"step": 1, "phase": "train", "self": 1}',
        '{"step": 1, "phase": "train", "up_bytes": 1.5}',
        '{"step": 1, "phase": "train", "up_bytes": -1}',
        '{"step": 1, "phase": "train", "edge_wait_s": NaN}',
        '{"step": 1, "phase": "train", "edge_wait_s": "1"}',
        '{"step": 1, "phase": "train", "edge_peak_tensor_bytes": true}',
        '{"step": 1, "phase": "train", "at": "12", "up_bytes": 1}',
        '{"step": 1, "phase": "train", "places": [1]}',
        '{"step": 1, "phase": "train", "places": null}',
        '{"step": 1, "phase": "train", "places": {"12": 1}}',
        '{"step": 1, "phase": "train", "places": {"q": {"up_bytes": 1}}}',
        '{"step": 1, "phase": "train", "places": {"12": {"up_bytes": -1}}}',
        '{"step": 1, "phase": "train", "places": {"12": {"bytes": 1}}}',
        '{"step": 1, "phase": "train", "places": {"12": {"places": {}}}}',
        "\xff",
        "",
    ],
)
def test_any_other_malformed_line_is_refused_by_file_and_line(path: Path, bad: str) -> None:
    good = '{"step": 1, "phase": "train", "up_bytes": 1}\n'
    path.write_bytes((good + bad + "\n" + good).encode("latin-1"))
    with pytest.raises(RunError, match=r"ledger\.jsonl:2: "):
        Ledger.resume(path)


def test_what_is_spent_at_a_place_is_of_the_phase_but_never_adds_to_it(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("train", up_bytes=100, round_trips=1)
    ledger.add("train", at="12", up_bytes=60)
    ledger.add("train", at="12.self_attn.q_proj", edge_forward_flops=7)
    ledger.add("eval", at="12", up_bytes=5)
    assert ledger.totals("train") == {"up_bytes": 100, "round_trips": 1}
    assert ledger.places("train") == {"12": {"up_bytes": 60}, "12.self_attn.q_proj": {"edge_forward_flops": 7}}
    assert (ledger.totals("eval"), ledger.places("eval")) == ({}, {"12": {"up_bytes": 5}})
    ledger.close_step(1)
    ledger.add("train", at="12", up_bytes=1)
    assert ledger.places("train")["12"] == {"up_bytes": 61}
    assert ledger.total("train", "up_bytes") == 100


def test_a_steps_line_holds_what_its_places_spent_since_the_last_and_nothing_where_they_spent_nothing(
    path: Path,
) -> None:
    ledger = Ledger(path)
    ledger.add("train", up_bytes=10)
    ledger.add("train", at="3", up_bytes=4, down_bytes=0)
    ledger.close_step(1)
    ledger.add("train", at="3", up_bytes=5, down_bytes=0)
    ledger.add("train", at="4", up_bytes=6)
    ledger.close_step(2)
    ledger.add("train", up_bytes=1)
    ledger.add("train", at="3", up_bytes=0)
    ledger.close_step(3)
    assert lines(path) == [
        {"step": 1, "phase": "train", "up_bytes": 10, "places": {"3": {"up_bytes": 4, "down_bytes": 0}}},
        {"step": 2, "phase": "train", "places": {"3": {"up_bytes": 5}, "4": {"up_bytes": 6}}},
        {"step": 3, "phase": "train", "up_bytes": 1},
    ]


def test_resuming_goes_on_from_what_each_place_spent_to_the_last_bit(path: Path) -> None:
    whole = Ledger(path)
    for step in range(10):
        whole.add("train", up_bytes=step)
        whole.add("train", at="3.mlp.up_proj", edge_forward_s=0.1 * step, edge_forward_flops=2**60 + step)
        whole.add("eval", at="3", down_bytes=0)
        whole.close_step(step)
    resumed = Ledger.resume(path)
    for phase in PHASES:
        assert (resumed.places(phase), resumed.totals(phase)) == (whole.places(phase), whole.totals(phase))
    for ledger in (whole, resumed):
        ledger.add("train", at="3.mlp.up_proj", edge_forward_s=0.3)
    assert resumed.places("train") == whole.places("train")


@pytest.mark.parametrize(
    "place", ["", "q_proj", "-1", "01", "1.", ".1", "1..q", "1.q-proj", "1.q\n", " 1", "1٣", "1/2"]
)
def test_a_place_of_another_form_is_refused_and_adds_nothing(place: str) -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="is no place"):
        ledger.add("train", at=place, up_bytes=1)
    with pytest.raises(ValueError, match="bytes"):
        ledger.add("train", at="1", round_trips=1, up_bytes=-1)
    with pytest.raises(ValueError, match="unknown phase"):
        ledger.places("lunch")  # type: ignore[arg-type]
    assert ledger.places("train") == {}


def test_a_missing_ledger_cannot_be_resumed_nor_an_existing_one_begun_again(path: Path) -> None:
    with pytest.raises(RunError, match="cannot read"):
        Ledger.resume(path)
    Ledger(path)
    with pytest.raises(RunError, match="exists already"):
        Ledger(path)


def test_unknown_names_and_impossible_numbers_are_refused_and_add_nothing() -> None:
    ledger = Ledger()
    for name, value in (("bytes", 1), ("up_bytes", -1), ("up_bytes", 0.5), ("edge_wait_s", float("inf"))):
        with pytest.raises(ValueError, match=name):
            ledger.add("train", at=None, **{"real_tokens": 1, name: value})
    with pytest.raises(ValueError, match="unknown phase 'lunch'"):
        ledger.add("lunch", up_bytes=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown figure"):
        ledger.total("train", "bytes")
    with pytest.raises(ValueError, match="unknown peak"):
        ledger.peak("peak", 1)
    assert ledger.totals("train") == {}


def test_every_documented_name_is_accepted(path: Path) -> None:
    ledger = Ledger(path)
    for phase in PHASES:
        ledger.add(phase, at=None, **dict.fromkeys(FIGURES, 2))
    for peak in PEAKS:
        ledger.peak(peak, 2)
    ledger.close_step(0)
    resumed = Ledger.resume(path)
    assert all(resumed.totals(phase) == dict.fromkeys(FIGURES, 2) for phase in PHASES)
    assert resumed.peaks() == dict.fromkeys(PEAKS, 2)
