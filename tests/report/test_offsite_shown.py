"""The table of offsite tuning on the terminal, as Markdown and as JSON, and the commands for rows that are missing."""

import json
from io import StringIO
from pathlib import Path

from rich.console import Console
from typer.testing import CliRunner

from edge_client.cli import app
from edge_client.runs import RunDirectory
from isthmus.report import evaluated as beside
from isthmus.report.evaluated import Evaluated, Kept
from isthmus.report.fields.score import Score
from isthmus.report.gains import in_words
from isthmus.report.offsite import tables
from isthmus.report.render import as_json, markdown, offsite_tables
from isthmus.report.schema import RunReport
from isthmus.training.scoring import Scores
from tests.report.example import report
from tests.report.offsite_example import (
    EMULATED,
    FULL,
    PLUGGED,
    ZERO,
    alone,
    carried_on,
    evaluated,
    everything,
    kept,
    offsite,
    per_row,
    score,
    scored,
    spending,
    table,
)


def drawn(runs: dict[str, RunReport], width: int) -> list[str]:
    console = Console(width=width, file=StringIO(), color_system=None)
    for shown in offsite_tables(runs, kept(runs)):
        console.print(shown)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


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
    runs = everything()
    said = in_words(table(runs))
    emulator = "rank, 26 blocks, 160 MB, 33 % of the span's FLOPs, loss +0.257 against the model on its owner's text"
    text, lines = markdown(runs, kept(runs)), " ".join(drawn(runs, 500))
    for one in (*said, emulator):
        assert one in text
        assert one in lines
    assert "| plugged in | 84.0 [81.6,86.1] | 0.3600 | - | 12.0 T | 911 MB | 312 MB | 250.0 |" in text
    for command in table(alone()).missing:
        assert f": `{command}`" in markdown(alone(), kept(alone()))
        assert f": {command} " in " ".join(drawn(alone(), 500)) + " "
    assert "Missing" not in text
    assert "Offsite" not in markdown({"full": scored(ZERO, FULL)})


def test_a_missing_row_has_the_command_that_would_make_it_and_a_filled_one_none() -> None:
    assert not table(everything()).missing
    new, scoring = "--data ROWS --eval-data HELD-OUT --out NEW", "edge_client evaluate --run runs/off --data HELD-OUT"
    assert table(alone()).missing == {
        f"{scoring} --span remote --server HOST:PORT --untouched": ["untouched model"],
        f"{scoring} --span remote --server HOST:PORT": ["plugged in"],
        f"edge_client train --method split --from runs/off --steps N {new} --server HOST:PORT": ["plus N true steps"],
        f"edge_client train --method split --cut 2:2 --server HOST:PORT --peft lora --steps 100 {new}": [
            "true span throughout"
        ],
    }
    served = list(table(alone(server="cloud:7070", train="top")).missing)
    assert served[1] == f"{scoring} --span remote"
    assert "--server cloud:7070 --peft lora --train top" in served[3]
    cut_short = table({"off": offsite(EMULATED, score(None, None))}).missing
    assert cut_short["edge_client train --resume --out runs/off"] == ["tuned on the emulator"]


def test_a_run_without_held_out_rows_is_compared_with_nothing_and_says_what_to_do() -> None:
    nothing = score(None, None)
    bare = scored(ZERO, FULL, eval_data=None)
    made = table({"off": offsite(nothing, nothing, eval_data=None), "full": bare})
    assert list(made.missing) == [
        "edge_client train --method offsite --data ROWS --eval-data HELD-OUT --out NEW --emulator DIR"
    ]
    assert {one.score for one in made.rows} == {None}


def test_a_command_quotes_a_path_that_a_shell_would_split() -> None:
    (made,) = tables(alone(), {"off": Kept("my runs/off")})
    assert "edge_client train --method split --from 'my runs/off' " in " ".join(made.missing)


def test_json_keeps_todays_runs_and_has_the_table_beside_them() -> None:
    runs = everything()
    both, one = json.loads(as_json(runs, kept(runs))), json.loads(as_json(alone(), kept(alone())))
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


def scores(of: Score) -> Scores:
    return Scores(**per_row(of).model_dump(), real_tokens=1, padded_tokens=1)


def test_the_command_reads_what_the_runs_that_it_is_given_have_beside_their_reports(tmp_path: Path) -> None:
    for name, run in everything().items():
        (tmp_path / name).mkdir()
        run.save(tmp_path / name)
        RunDirectory(tmp_path / name).write_scores(scores(run.eval.before), scores(run.eval.after))
    late = evaluated(score(85, 0.35)).model_dump(exclude={"per_row"})
    beside.append(tmp_path / "off", Evaluated(**late), per_row(score(85, 0.35)))
    shown = CliRunner().invoke(app, ["report", *(str(tmp_path / name) for name in everything())])
    assert "plugged in             85.0 [82.7,87.1]  0.3500  200 MB" in shown.output
    assert shown.output.index("Accuracy before") < shown.output.index("off, tuned on an emulator")
    assert "Plugging in gained over the untouched model: accuracy +7.0 points [+5." in shown.output
    file = CliRunner().invoke(app, ["report", str(tmp_path / "off" / "run.json"), "--format", "md"])
    assert "| plugged in | - |" in file.output
    assert f"edge_client evaluate --run {tmp_path / 'off'} --data HELD-OUT" in file.output
