"""The table of offsite tuning: each row is from where it must be, and the words say what the scores show."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from edge_client.cli import app
from isthmus.report import evaluated as kept
from isthmus.report.evaluated import Evaluated
from isthmus.report.gains import in_words
from isthmus.report.offsite import Row, Table, tables
from isthmus.report.render import as_json, markdown, offsite_tables
from isthmus.report.schema import BegunFrom, RunReport, Score
from tests.report.example import HELD_OUT, OTHER, carried_on, evaluated, offsite, report, score, scored, spending

ZERO, EMULATED, TUNED, PLUGGED, ON, FULL = (
    *(score(78, 0.48), score(62, 0.6), score(75.5, 0.42)),
    *(score(84, 0.36), score(86.8, 0.32), score(87.4, 0.31)),
)
FILLED = "untouched model", "untouched emulator", "tuned on the emulator", "plugged in", "plus 10 true steps"


def alone(**changed: Any) -> dict[str, RunReport]:
    return {"off": offsite(EMULATED, TUNED, **changed)}


def everything() -> dict[str, RunReport]:
    return {**alone(), "on": carried_on(PLUGGED, ON), "full": scored(ZERO, FULL, steps=100)}


def table(runs: dict[str, RunReport], *lines: Evaluated) -> Table:
    (found,) = tables(runs, {"off": lines})
    return found


def row(label: str, runs: dict[str, RunReport], *lines: Evaluated) -> Row:
    (found,) = (one for one in table(runs, *lines).rows if one.label == label)
    return found


def words(plugged: Score, *, zero: Score = ZERO, tuned: Score = TUNED, full: Score | None = None) -> list[str]:
    """What is said where the model was scored so before, after plugging in, and tuned on the true span throughout."""
    runs = {"off": offsite(EMULATED, tuned)} | ({"full": scored(zero, full, steps=100)} if full else {})
    return list(in_words(table(runs, evaluated(plugged), evaluated(zero, untouched=True))))


def drawn(runs: dict[str, RunReport], width: int, *lines: Evaluated) -> list[str]:
    console = Console(width=width, file=StringIO(), color_system=None)
    for shown in offsite_tables(runs, {"off": lines}):
        console.print(shown)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def test_the_rows_stand_from_the_untouched_model_to_the_true_span_throughout_with_their_scores() -> None:
    rows = table(everything()).rows
    assert [one.label for one in rows] == [*FILLED, "true span throughout"]
    assert [one.score for one in rows] == [ZERO, EMULATED, TUNED, PLUGGED, ON, FULL]
    assert [one.runs for one in rows] == [("full",), ("off",), ("off",), ("off", "on"), ("off", "on"), ("full",)]


def test_only_a_run_on_an_emulator_has_a_table() -> None:
    assert [made.name for made in tables({**everything(), "two": offsite(ZERO, ON)}, {})] == ["off", "two"]
    assert not tables({"full": scored(ZERO, FULL)}, {})


def test_the_latest_evaluation_on_the_true_span_goes_before_what_other_runs_say() -> None:
    lines = evaluated(ON), evaluated(TUNED, span="local"), evaluated(FULL, span="emulated")
    assert row("plugged in", everything(), *lines).score == TUNED
    assert row("untouched model", everything(), evaluated(ON, untouched=True), *lines).score == ON
    assert row("plugged in", everything(), evaluated(ON, untouched=True)).score == PLUGGED


def test_scores_on_other_rows_of_another_model_or_cut_or_adapter_fill_no_row() -> None:
    assert row("plugged in", alone(), evaluated(PLUGGED, data=OTHER)).score is None
    assert row("untouched model", alone(), evaluated(ZERO, data=OTHER, untouched=True)).score is None
    others: list[dict[str, Any]] = [{"eval_data": OTHER}, {"model_digest": OTHER}, {"cut": "1:1"}, {"method": "dlora"}]
    for other in (*others, {"begun_from": BegunFrom(method="offsite", adapter=OTHER)}):
        on, full = carried_on(PLUGGED, ON, **other), scored(ZERO, FULL, **other)
        made = table({**alone(), "on": on, "full": full})
        assert [one.score for one in made.rows] == [None, EMULATED, TUNED, None, None, None], other


def test_a_run_without_held_out_rows_is_compared_with_nothing_and_says_what_to_do() -> None:
    nothing = score(None, None)
    bare = scored(ZERO, FULL, eval_data=None)
    (made,) = tables({"off": offsite(nothing, nothing, eval_data=None), "full": bare}, {"off": ()})
    assert list(made.missing) == [
        "edge_client train --method offsite --data ROWS --eval-data HELD-OUT --out NEW --emulator DIR"
    ]
    assert {one.score for one in made.rows} == {None}


def test_a_run_that_began_with_another_ones_adapter_does_not_call_its_emulator_untouched() -> None:
    made = table(alone(begun_from=BegunFrom(method="split", adapter=OTHER)))
    assert made.rows[1].label == "emulator, before"
    assert in_words(made) == ("off began with the adapter of an earlier run (split); what that cost is not in it.",)


def test_each_run_that_carried_on_has_a_row_the_fewest_steps_first() -> None:
    runs = {**alone(), "more": carried_on(PLUGGED, FULL, 1_200), "one": carried_on(PLUGGED, ON, 1)}
    labels = [one.label for one in table(runs).rows]
    assert labels[4:6] == ["plus 1 true step", "plus 1,200 true steps"]


def test_of_runs_on_the_true_span_the_likest_is_shown_and_not_the_best() -> None:
    params = report().params.model_copy(update={"trainable": 99})
    runs = {
        **alone(),
        "fewer": scored(ZERO, FULL, steps=100, params=params),
        "steps": scored(ZERO, score(99, 0.1), steps=300),
        "peft": scored(ZERO, score(98, 0.1), steps=100, peft_type="BITFIT"),
        "like": scored(ZERO, FULL, steps=110),
        "unfinished": scored(ZERO, score(None, None), steps=100),
    }
    assert table(runs).throughout.runs == ("like",)
    assert in_words(table(runs))[-1] == (
        "like, on the true span throughout, was not the same tuning: 110 steps where this one had 100."
    )
    del runs["like"], runs["steps"], runs["fewer"]
    assert "BITFIT where this one had LORA." in in_words(table(runs))[-1]
    assert (
        "99 trained parameters where this one had 230,400."
        in in_words(table({**alone(), "full": scored(ZERO, FULL, steps=100, params=params)}))[-1]
    )


def test_costs_are_those_of_all_the_runs_that_made_a_row() -> None:
    tuned = row("tuned on the emulator", everything()).spent
    assert vars(tuned) == {
        "wire_bytes": 160_000_000,
        "flops": 12 * 10**12,
        "memory_bytes": 911_000_000,
        "tensor_bytes": 312_000_000,
        "tokens_per_s": 250.0,
    }
    assert row("plugged in", everything(), evaluated(PLUGGED)).spent.wire_bytes == 200_000_000
    on = everything()["on"]
    edge = on.cost.edge.model_copy(update={"peak_memory_bytes": 5 * 10**9, "peak_tensor_bytes": 7})
    on = on.model_copy(update={"cost": on.cost.model_copy(update={"edge": edge})})
    spent = row("plus 10 true steps", {**everything(), "on": on}).spent
    assert (spent.wire_bytes, spent.flops) == (167_000_000, 13 * 10**12)
    assert (spent.memory_bytes, spent.tensor_bytes) == (5 * 10**9, 312_000_000)
    assert spent.tokens_per_s == pytest.approx(2_000 / (1_000 / 250 + 1_000 / 50))
    assert row("true span throughout", everything()).spent.wire_bytes == 381_202_558


def test_what_was_not_measured_apart_is_not_claimed() -> None:
    assert row("plugged in", everything()).spent.wire_bytes is None
    assert row("plugged in", everything()).spent.flops == 12 * 10**12
    for label in FILLED[:2]:
        assert set(vars(row(label, everything()).spent).values()) == {None}
    run = everything()["off"]
    edge = run.cost.edge.model_copy(update={"backward_flops": None, "peak_memory_bytes": None})
    run = run.model_copy(update={"cost": run.cost.model_copy(update={"edge": edge})})
    spent = row("plus 10 true steps", {**everything(), "off": run}).spent
    assert (spent.flops, spent.memory_bytes, spent.tensor_bytes) == (None, None, 312_000_000)


def test_a_missing_row_has_the_command_that_would_make_it_and_a_filled_one_none() -> None:
    assert not table(everything()).missing
    new, scoring = "--data ROWS --eval-data HELD-OUT --out NEW", "edge_client evaluate --run off --data HELD-OUT"
    assert table(alone()).missing == {
        f"{scoring} --span remote --server HOST:PORT --untouched": ["untouched model"],
        f"{scoring} --span remote --server HOST:PORT": ["plugged in"],
        f"edge_client train --method split --from off --steps N {new} --server HOST:PORT": ["plus N true steps"],
        f"edge_client train --method split --cut 2:2 --server HOST:PORT --peft lora --steps 100 {new}": [
            "true span throughout"
        ],
    }
    served = list(table(alone(server="cloud:7070", train="top")).missing)
    assert served[1] == f"{scoring} --span remote"
    assert "--server cloud:7070 --peft lora --train top" in served[3]
    cut_short = table({"off": offsite(EMULATED, score(None, None))}).missing
    assert cut_short["edge_client train --resume --out off"] == ["tuned on the emulator"]


def test_a_command_quotes_a_name_that_a_shell_would_split() -> None:
    (made,) = tables({"my run": alone()["off"]}, {})
    assert "edge_client train --method split --from 'my run' " in " ".join(made.missing)


def test_a_gain_is_said_in_points_and_in_loss() -> None:
    assert words(PLUGGED)[0] == "Plugging in gained over the untouched model: accuracy +6.0 points, loss -0.1200."
    only_loss = words(score(None, 0.36), zero=score(None, 0.48), tuned=score(None, 0.42))
    assert only_loss[0] == "Plugging in gained over the untouched model: loss -0.1200."


def test_intervals_that_overlap_are_said_to_be_noise() -> None:
    assert words(score(79, 0.4))[0] == (
        "Plugging in gained over the untouched model: "
        "accuracy +1.0 points (within the noise of 1,000 rows), loss -0.0800."
    )


def test_that_plugging_in_made_things_worse_is_said_so() -> None:
    assert words(score(70, 0.5))[0] == (
        "Plugging in made things worse than the untouched model: accuracy -8.0 points, loss +0.0200."
    )
    assert words(score(None, 0.5), zero=score(None, 0.48))[0].startswith("Plugging in made things worse")
    assert words(score(78, 0.5))[0].startswith("Plugging in made things worse")


def test_where_one_measure_rose_and_the_other_fell_neither_is_kept_back() -> None:
    assert words(score(84, 0.5))[0] == (
        "Plugging in made one thing better and the other worse than the untouched model: "
        "accuracy +6.0 points, loss +0.0200."
    )


def test_no_change_is_called_neither_gain_nor_loss() -> None:
    assert words(score(78, 0.48001))[0].startswith("Plugging in left the untouched model's scores as they were: ")


def test_the_share_is_of_the_gain_of_tuning_on_the_true_span_throughout_and_true_steps_have_theirs() -> None:
    assert in_words(table(everything()))[1] == (
        "Of the gain of tuning on the true span throughout (accuracy +9.4 points, loss -0.1700): "
        "plugging in has 64 % in accuracy and 71 % in loss; plus 10 true steps 94 % in accuracy and 94 % in loss."
    )
    assert words(score(77, 0.5), full=FULL)[1].endswith("plugging in has none in accuracy and none in loss.")


def test_where_the_true_span_gained_nothing_there_is_no_share() -> None:
    assert words(PLUGGED, full=score(70, 0.49))[1] == (
        "Tuning on the true span throughout gained nothing in accuracy or loss "
        "(accuracy -8.0 points, loss +0.0100): there is no share of it."
    )
    said = words(PLUGGED, full=score(78, 0.3))
    assert said[1].endswith(": plugging in has 67 % in loss.")
    assert said[2] == "Tuning on the true span throughout gained nothing in accuracy: there is no share of it."


def test_the_owners_protection_is_plugged_in_minus_the_tuned_emulator() -> None:
    assert words(PLUGGED)[-1] == (
        "The plugged-in model is better than the tuned emulator alone, which is the owner's protection: "
        "accuracy +8.5 points, loss -0.0600."
    )
    assert "(within the noise of 1,000 rows)" in words(score(76, 0.41))[-1]


def test_that_the_emulator_alone_is_as_good_is_said_to_be_no_protection() -> None:
    none = "No protection for the owner: the tuned emulator alone is as good as the plugged-in model"
    assert words(score(68, 0.43))[-1] == f"{none} or better: accuracy -7.5 points, loss +0.0100."
    assert words(TUNED)[-1].startswith(f"{none}: accuracy +0.0 points (within the noise")


def test_protection_in_one_measure_only_is_no_more_than_that() -> None:
    assert words(score(82, 0.5))[-1] == (
        "The owner's protection is in one measure only, the plugged-in model against the tuned emulator alone: "
        "accuracy +6.5 points, loss +0.0800."
    )


def test_nothing_is_said_of_what_has_no_score() -> None:
    assert in_words(table(alone())) == ()
    assert len(in_words(table(alone(), evaluated(PLUGGED)))) == 1


def test_a_row_takes_one_line_of_a_hundred_columns_and_two_of_eighty() -> None:
    wide, narrow = drawn(everything(), 100), drawn(everything(), 80)
    line = next(line for line in wide if line.startswith("tuned on the emulator"))
    assert line.split()[4:] == [
        *("75.5", "[72.7,78.1]", "0.4200", "160", "MB"),
        *("12.0", "T", "911", "MB", "312", "MB", "250.0"),
    ]
    assert "tuned on the            75.5  0.4200  160 MB  12.0 T   911 MB   312 MB     250.0" in narrow
    assert "emulator         [72.7,78.1]" in [line.rstrip() for line in narrow]
    huge = {**alone(), "on": carried_on(PLUGGED, score(86.8, 13.3), 12_345)}
    huge["off"] = spending(huge["off"], 987_654_321_000, 876_543 * 10**12, 12_345.6)
    for width in (100, 80):
        assert not any("…" in line or len(line) > width for line in drawn(huge, width))


def test_terminal_and_markdown_say_the_emulator_every_sentence_and_every_command() -> None:
    said = in_words(table(everything()))
    emulator = "rank, 26 blocks, 160 MB, 33 % of the span's FLOPs, loss +0.257 against the model on its owner's text"
    text, lines = markdown(everything()), " ".join(drawn(everything(), 500))
    for one in (*said, emulator):
        assert one in text
        assert one in lines
    assert "| plugged in | 84.0 [81.6,86.1] | 0.3600 | - | 12.0 T | 911 MB | 312 MB | 250.0 |" in text
    for command in table(alone()).missing:
        assert f": `{command}`" in markdown(alone())
        assert f": {command} " in " ".join(drawn(alone(), 500)) + " "
    assert "Missing" not in text
    assert "Offsite" not in markdown({"full": scored(ZERO, FULL)})


def test_json_keeps_todays_runs_and_has_the_table_beside_them() -> None:
    runs = everything()
    both, one = json.loads(as_json(runs)), json.loads(as_json(alone()))
    made = both.pop("offsite_tables")
    assert {name: RunReport.model_validate_json(json.dumps(run)) for name, run in both.items()} == runs
    assert list(made) == ["off"]
    assert [found["score"] and found["score"]["loss"] for found in made["off"]["rows"]] == [
        *(0.48, 0.6, 0.42, 0.36, 0.32, 0.31)
    ]
    assert made["off"]["rows"][2]["wire_bytes"] == 160_000_000
    assert made["off"]["emulator"]["emulator"] == "e0" * 32
    assert made["off"]["words"] == list(in_words(table(runs)))
    commands = {found["command"] for found in one.pop("offsite_tables")["off"]["rows"]}
    assert commands == {None, *table(alone()).missing}
    assert RunReport.model_validate_json(json.dumps(one)) == alone()["off"]
    assert as_json({"a": report()}) == json.dumps(report().model_dump(mode="json"), indent=2)


def test_the_command_reads_the_evaluations_of_the_runs_that_it_is_given(tmp_path: Path) -> None:
    for name, run in everything().items():
        (tmp_path / name).mkdir()
        run.save(tmp_path / name)
    kept.append(tmp_path / "off", evaluated(score(85, 0.35), data=HELD_OUT))
    shown = CliRunner().invoke(app, ["report", *(str(tmp_path / name) for name in everything())])
    assert "plugged in             85.0 [82.7,87.1]  0.3500  200 MB" in shown.output
    assert shown.output.index("Accuracy before") < shown.output.index("off, tuned on an emulator")
    file = CliRunner().invoke(app, ["report", str(tmp_path / "off" / "run.json"), "--format", "md"])
    assert "| plugged in | - |" in file.output
