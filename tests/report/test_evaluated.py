"""What is beside a run's report is read as it was written, and refused with a remedy where it is damaged."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from edge_client.runs import RunDirectory
from isthmus.errors import RunError
from isthmus.report.evaluated import FILE_NAME, SCORES_NAME, Evaluated, Kept, append, read
from isthmus.training.scoring import Scores
from tests.report.offsite_example import OTHER, PLUGGED, TUNED, evaluated, per_row


def bare(**changed: Any) -> Evaluated:
    return Evaluated(**evaluated(PLUGGED, **changed).model_dump(exclude={"per_row"}))


def test_evaluations_come_back_in_their_order_with_the_figures_of_each_row(tmp_path: Path) -> None:
    append(tmp_path, bare(), per_row(PLUGGED))
    append(tmp_path, bare(span="emulated", emulator=OTHER, untouched=True), per_row(TUNED))
    later = evaluated(PLUGGED, per_row(TUNED), span="emulated", emulator=OTHER, untouched=True)
    assert read(tmp_path) == Kept(str(tmp_path), (evaluated(PLUGGED), later))


def test_figures_of_a_runs_own_scores_come_back_as_the_run_wrote_them(tmp_path: Path) -> None:
    found = Scores((1.5, 0.1), (3, 1), (True,), 9, 9)
    RunDirectory(tmp_path).write_scores(None, found)
    kept = read(tmp_path)
    assert kept.before is None
    assert kept.after is not None
    assert (kept.after.nats, kept.after.tokens, kept.after.correct) == (found.nats, found.tokens, found.correct)


def test_of_a_report_that_is_named_itself_only_its_place_is_known(tmp_path: Path) -> None:
    append(tmp_path, bare(), per_row(PLUGGED))
    assert read(tmp_path / "run.json") == Kept(str(tmp_path))


TORN = evaluated(TUNED).model_dump_json().encode()[:200], b"{", b'{"span": "r\xff'


@pytest.mark.parametrize("torn", TORN)
def test_a_line_that_a_crash_tore_off_is_no_evaluation_and_does_no_harm_to_later_ones(
    torn: bytes, tmp_path: Path
) -> None:
    append(tmp_path, bare(), per_row(PLUGGED))
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(torn)
    assert read(tmp_path).evaluations == (evaluated(PLUGGED),)
    append(tmp_path, bare(), per_row(TUNED))
    assert read(tmp_path).evaluations == (evaluated(PLUGGED), evaluated(PLUGGED, per_row(TUNED)))


def test_a_first_line_that_was_torn_is_no_evaluation_either(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(TORN[0])
    assert read(tmp_path).evaluations == ()


def test_a_last_line_whose_end_an_editor_took_counts_and_the_next_begins_a_line(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(evaluated(PLUGGED).model_dump_json())
    assert read(tmp_path).evaluations == (evaluated(PLUGGED),)
    append(tmp_path, bare(), per_row(TUNED))
    assert read(tmp_path).evaluations == (evaluated(PLUGGED), evaluated(PLUGGED, per_row(TUNED)))


def test_an_evaluation_is_on_the_disk_when_it_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    append(tmp_path, bare(), per_row(PLUGGED))
    assert {(tmp_path / FILE_NAME).stat().st_ino, tmp_path.stat().st_ino} <= set(synced)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"adapter": None}, "the adapter is to be named where one was scored"),
        ({"untouched": True, "adapter": OTHER}, "the adapter is to be named where one was scored"),
        ({"span": "emulated"}, "the emulator is to be named where one was used"),
        ({"emulator": OTHER}, "the emulator is to be named where one was used"),
    ],
)
def test_an_evaluation_says_which_adapter_and_emulator_it_is_of(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        evaluated(PLUGGED, **changed)


@pytest.mark.parametrize("missing", ["adapter", "emulator", "per_row"])
def test_a_line_that_lacks_a_field_is_refused_by_its_number(missing: str, tmp_path: Path) -> None:
    append(tmp_path, bare(), per_row(PLUGGED))
    line = evaluated(PLUGGED)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write(line.model_dump_json(exclude={missing}) + "\n")
    where = re.escape(f"{tmp_path / FILE_NAME}:2: not an evaluation")
    with pytest.raises(RunError, match=rf"{where} \(.*\); delete the line"):
        read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"schema": "isthmus-scores/2", "before": null, "after": null}',
        '{"schema": "isthmus-scores/1", "before": null, "after": {"nats": [1.0], "tokens": [1, 2], "correct": []}}',
        '{"schema": "isthmus-scores/1", "before": null, "after": {"nats": [NaN], "tokens": [1], "correct": []}}',
    ],
)
def test_damaged_scores_are_refused_with_a_remedy(content: str, tmp_path: Path) -> None:
    path = tmp_path / SCORES_NAME
    path.write_text(content)
    with pytest.raises(RunError, match=rf"{re.escape(str(path))}: not scores \(.*\); delete the file"):
        read(tmp_path)
