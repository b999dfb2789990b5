"""What others say of their costs is read within limits, and nothing in it is believed that is not theirs to say."""

import json
from pathlib import Path

import pytest

from isthmus.errors import BundleError
from isthmus.ledger import told
from isthmus.ledger.record import Ledger
from isthmus.ledger.told import Told, beside, parse, read, write
from isthmus.report.stages import stages_told

HEAD = {"schema": told.SCHEMA, "of": "ab" * 32, "stored_bytes": 17}
BUILD = {"step": 0, "phase": "build", "cloud_forward_s": 1.5, "cloud_forward_flops": 10, "cloud_peak_memory_bytes": 9}
STEPS = [{"step": step, "phase": "distil", "cloud_backward_flops": 4, "cloud_backward_s": 0.25} for step in (1, 2, 3)]


def record(*lines: object) -> bytes:
    return "\n".join(json.dumps(line) for line in lines).encode()


def test_a_line_for_each_stage_says_what_a_line_for_each_step_does() -> None:
    whole = parse(record(HEAD, BUILD, *STEPS))
    short = parse("\n".join(whole.lines()).encode())
    assert stages_told(whole) == stages_told(short)
    build, distil = stages_told(whole)
    assert (build.seconds, build.stored_bytes, build.cloud_peak_memory_bytes) == (1.5, 17, 9)
    assert (distil.steps, distil.cloud_backward_flops, distil.seconds, distil.stored_bytes) == (3, 12, 0.75, None)
    assert len(whole.lines()) == 3


def test_what_is_written_beside_a_folder_is_read_there(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.add("plug-in", cloud_update_s=2.0)
    place = beside(tmp_path / "made")
    assert read(place) is None
    write(place, "cd" * 32, 5, Told("cd" * 32, 5, ledger, {}).lines()[1:])
    found = read(place)
    assert found is not None
    assert (place.name, found.of, found.ledger.totals("plug-in")) == (
        "made.costs.jsonl",
        "cd" * 32,
        {"cloud_update_s": 2.0},
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        record(BUILD),
        record({**HEAD, "schema": "isthmus-costs/2"}),
        record({**HEAD, "of": "../../etc"}),
        record({**HEAD, "stored_bytes": -1}),
        record(HEAD, {**BUILD, "phase": "train"}),
        record(HEAD, {**BUILD, "up_bytes": 5}),
        record(HEAD, {**BUILD, "edge_forward_s": 5}),
        record(HEAD, {**BUILD, "places": {"1": {"cloud_forward_s": 1}}}),
        record(HEAD, {**BUILD, "cloud_made_up": 5}),
        record(HEAD, {**BUILD, "cloud_forward_flops": 10**40}),
        record(HEAD, {**BUILD, "cloud_forward_s": 1e40}),
        record(HEAD, {**BUILD, "cloud_peak_memory_bytes": 10**40}),
        record(HEAD, {**BUILD, "cloud_forward_s": float("nan")}),
        record(HEAD, {**BUILD, "cloud_forward_s": -1.0}),
        record(HEAD, {**BUILD, "step": "3"}),
        record(HEAD, [1]),
        record(HEAD) + b"\n" + b"[" * 50_000,
        record(HEAD) + b'\n{"step": ' + b"9" * 10_000 + b"}",
        record(HEAD, *STEPS * 1000),
    ],
    ids=range(21),
)
def test_anything_else_is_refused_in_one_short_line(content: bytes) -> None:
    with pytest.raises(BundleError) as refused:
        parse(content)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
